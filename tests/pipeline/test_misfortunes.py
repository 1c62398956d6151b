"""Run a suite with four bad methods beside two good ones: one raises, diverges, sleeps, or hoards memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from petlbench.results.leaderboard import table
from petlbench.results.store import Store
from tests.core.test_registry import install

METHODS = """
import time
import torch
from torch import nn
from petlbench.methods.selective import HeadOnly


class Raises(HeadOnly):
    def adapt(self, backbone):
        raise LookupError("there is no such layer")


class NotANumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float("nan")))

    def forward(self, x, h):
        return self.gain * h


class Diverges(HeadOnly):
    def adapt(self, backbone):
        next(iter(super().adapt(backbone).stack("encoder")))["ffn"].insert("output", NotANumber())
        return backbone


class Sleeps(HeadOnly):
    def adapt(self, backbone):
        time.sleep(3600)


class Hoards(HeadOnly):
    def adapt(self, backbone):
        held = []
        while True:
            held.append(torch.ones(2**24))
"""
NAMES = ("Raises", "Diverges", "Sleeps", "Hoards")
SUITE: dict[str, Any] = {
    "name": "misfortunes",
    "methods": ["head_only", *map(str.lower, NAMES), "bitfit"],
    "tasks": ["vqa"],
    "backbones": ["tiny"],
    "recipe": {"steps": 2, "batch_size": 4, "train_limit": 8, "eval_limit": 8},
    "dataset_configs": {"digits": {"train_scenes": 24, "validation_scenes": 12, "test_scenes": 12}},
    "timeout": 40,
    "memory_limit": "3 GiB",
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Install a distribution with the four bad methods."""
    folder = tmp_path / "site"
    folder.mkdir()
    points = {name.lower(): f"misfortunes:{name}" for name in NAMES}
    install(folder, "misfortunes", points, {"misfortunes": METHODS}, group="petlbench.methods")
    return folder


@pytest.mark.slow
def test_every_misfortune_is_a_row_with_its_outcome_and_reason(site: Path, tmp_path: Path) -> None:
    (tmp_path / "misfortunes.yaml").write_text(yaml.safe_dump(SUITE))
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "petlbench", "run", "misfortunes.yaml", "--out", "out", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": path, "PETLBENCH_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    records = {record.cell.method: record for record in Store.open(tmp_path / "out", create=False).load()}
    assert {name: record.outcome for name, record in records.items()} == {
        "head_only": "ok",
        "raises": "failed",
        "diverges": "diverged",
        "sleeps": "timeout",
        "hoards": "oom",
        "bitfit": "ok",
    }
    assert records["raises"].reason == "LookupError: there is no such layer"
    assert records["raises"].log[-1] == "LookupError: there is no such layer"
    assert records["diverges"].reason.startswith("the loss is nan at step 1 of 2")
    assert records["sleeps"].reason == "took longer than the timeout of 40 s"
    assert "passed the memory_limit of 3 GiB" in records["hoards"].reason
    assert all(f"{record.outcome}: {record.cell.label}" in done.stderr for record in records.values() if record.reason)
    assert len(table(Store.open(tmp_path / "out", create=False))) == 6
