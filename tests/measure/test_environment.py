"""What a record says of torch's switches: those that change numbers."""

from __future__ import annotations

import json

import pytest
import torch

from petlbench.measure.environment import describe, switches


@pytest.mark.parametrize("value", [True, False])
def test_cudnn_switches_are_recorded_as_they_stand(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", value)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not value)
    found = switches()
    assert (found["cudnn_deterministic"], found["cudnn_benchmark"]) == (value, not value)


def test_reduced_matrix_products_are_recorded() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for wanted, tf32 in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(wanted)
            found = switches()
            assert (found["matmul_precision"], found["tf32_matmul"]) == (wanted, tf32)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_cublas_workspace_and_real_threads_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found = describe("cpu", threads=7)
    assert found["cublas_workspace"] == ":4096:8"
    assert (found["threads"], found["intra_op_threads"]) == (7, torch.get_num_threads())
    assert found["inter_op_threads"] == torch.get_num_interop_threads()
    assert all(found[name] for name in ("tokenizers", "pillow", "safetensors", "pydantic", "scikit-learn"))
    assert json.loads(json.dumps(found)) == found
