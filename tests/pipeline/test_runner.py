"""Run whole cells on the embedded backbone and data, in this process, for a few steps each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from petlbench.api.registries import METHODS
from petlbench.core.cell import Cell
from petlbench.core.recipe import Recipe
from petlbench.core.record import Record, Size
from petlbench.pipeline import cell as cell_module
from petlbench.pipeline import trials
from petlbench.pipeline.cell import run_cell, size_of
from petlbench.pipeline.options import RunOptions
from petlbench.results.store import Store
from petlbench.training.evaluation import evaluate
from petlbench.training.loop import Diverged, fit

SMALL = {"train_scenes": 24, "validation_scenes": 12, "test_scenes": 12}
TASKS = ("rec", "vqa", "captioning", "retrieval")
METHOD_NAMES = ("full", "head_only", "bitfit", "lora", "vl_adapter")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETLBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def cell(method: str = "lora", task: str = "vqa", **changes: Any) -> Cell:
    recipe = Recipe(**{"steps": 4, "batch_size": 4, "eval_batch_size": 8, **changes.pop("recipe", {})})
    return Cell(
        method=method, task=task, dataset="digits", dataset_config=SMALL, backbone="tiny", recipe=recipe, **changes
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_runs_on_every_task_and_is_measured(method: str, task: str, tmp_path: Path) -> None:
    record = run_cell(cell(method, task), tmp_path, RunOptions(device="cpu"))
    assert (record.outcome, record.reason) == ("ok", "")
    assert record == Store.open(tmp_path, create=False).load()[0]
    assert record.main_metric in record.metrics and record.main_metric in record.validation
    count, memory, timing = record.parameters, record.memory, record.timing
    assert count and memory and timing
    assert count.trainable == count.method + count.head + count.host <= count.total
    assert (count.method == 0) == (method == "head_only")
    assert count.percent == pytest.approx(100 * count.trainable / count.total)
    assert 0 < memory.gradients_bytes <= 4 * count.trainable  # a decoder that a task does not use gets none
    assert memory.saved_bytes > 0 and memory.peak_rss_bytes
    assert sum(timing.phases.values()) == pytest.approx(timing.total_seconds, rel=0.01)
    assert timing.step_seconds and timing.forward_seconds and timing.backward_seconds and timing.optimizer_seconds
    assert record.flops and 0 < record.flops.forward < record.flops.step
    predicting = record.inference
    assert predicting and predicting.latency_seconds and predicting.throughput
    assert (predicting.merged_latency_seconds is not None) == (method == "lora")
    assert count.stored == count.trainable and count.inference_extra is not None
    assert (count.inference_extra > 0) == (method == "vl_adapter")  # a merged method leaves no extra scalars
    assert memory.native_saved_bytes and memory.accounted_bytes == (
        memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes + memory.saved_bytes
    )
    assert set(record.fingerprints) == {
        "method", "task", "metric", "backbone", "source", "training", "data", "weights"
    }  # fmt: skip
    assert record.size is None and record.parameters.effective is not None
    # vqa uses every part; a task that decodes nothing gives a decoder no gradient.
    assert (record.parameters.effective < record.parameters.trainable) == (task != "vqa" and method != "head_only")
    stored = tmp_path / "adapters" / f"{record.cell.id}.safetensors"
    assert count.stored_bytes == stored.stat().st_size
    with safe_open(stored, "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == count.trainable  # noqa: SIM118
    samples = Store.open(tmp_path, create=False).samples(record)
    assert samples and len(samples["sample_ids"]) == len(samples["scores"][record.main_metric])
    assert ("predictions" in samples) == (task != "retrieval")
    assert any("laboratory" in note for note in record.notes)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(tmp_path: Path) -> None:
    first, again = (run_cell(cell(), tmp_path / name, RunOptions(device="cpu")) for name in "ab")
    other = run_cell(cell(seed=1), tmp_path, RunOptions(device="cpu"))
    assert first.trials == again.trials and first.metrics == again.metrics
    assert first.trials != other.trials


def test_a_search_keeps_all_trials_and_tests_the_best_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.2, 0.9, 0.5])
    states: list[dict[str, torch.Tensor]] = []
    real = fit

    def scripted(setup: Any, train: Any, validation: Any, lr: float, **options: Any) -> Any:
        result = real(setup, train, validation, lr, **options)
        states.append(result.state)
        return type(result)(**{**result.__dict__, "validation": {"vqa_accuracy": next(scores)}})

    monkeypatch.setattr(trials, "fit", scripted)
    record = run_cell(cell(recipe={"lr": 1e-3, "lr_factors": (0.5, 1, 2)}), tmp_path, RunOptions(device="cpu"))
    assert [trial.lr for trial in record.trials] == [5e-4, 1e-3, 2e-3]
    assert (record.chosen_lr, record.validation) == (1e-3, {"vqa_accuracy": 0.9})
    stored = tmp_path / "adapters" / f"{record.cell.id}.safetensors"
    with safe_open(stored, "pt") as file:
        assert all(torch.equal(file.get_tensor(name), states[1][name]) for name in file.keys())  # noqa: SIM118
    # Every trial starts from the same values, whatever the one before it changed.
    monkeypatch.setattr(trials, "fit", real)
    alone = run_cell(cell(recipe={"lr": 2e-3}), tmp_path / "alone", RunOptions(device="cpu"))
    assert record.trials[2].losses == alone.trials[0].losses


def test_one_diverged_trial_is_recorded_and_the_others_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fit

    def sometimes(setup: Any, train: Any, validation: Any, lr: float, **options: Any) -> Any:
        if lr > 1e-3:
            raise Diverged("the loss is nan")
        return real(setup, train, validation, lr, **options)

    monkeypatch.setattr(trials, "fit", sometimes)
    record = run_cell(cell(recipe={"lr": 1e-3, "lr_factors": (1, 3)}), tmp_path, RunOptions(device="cpu"))
    assert (record.outcome, [trial.outcome for trial in record.trials]) == ("ok", ["ok", "diverged"])


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Diverged("nan"), "diverged"),
        (torch.OutOfMemoryError("no room"), "oom"),
        (MemoryError("no room"), "oom"),
        (ZeroDivisionError("oh"), "failed"),
    ],
)
def test_what_goes_wrong_is_recorded_with_its_reason(
    error: Exception, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(trials, "fit", fail)
    record: Record = run_cell(cell(), tmp_path, RunOptions(device="cpu"))
    assert record.outcome == outcome and str(error) in record.reason
    assert Store.open(tmp_path, create=False).load() == [record]


def test_a_measurement_that_does_not_fit_in_memory_does_not_cost_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starve(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(cell_module, "canonical_saved_bytes", starve)
    monkeypatch.setattr(cell_module, "inference", starve)
    record = run_cell(cell(), tmp_path, RunOptions(device="cpu"))
    assert record.outcome == "ok" and record.metrics and record.flops
    assert record.memory and record.memory.weights_bytes and record.memory.accounted_bytes is None
    assert record.inference is None
    assert {"saved tensors not measured: out of memory", "inference not measured: out of memory"} <= set(record.notes)
    assert Store.open(tmp_path, create=False).load() == [record]


def test_the_size_is_the_option_that_the_method_names_where_it_is_set() -> None:
    assert size_of(cell("lora", method_config={"rank": 4})) == Size(name="rank", value=4)
    assert size_of(cell("lora")) is None  # its size is a share of the backbone's width
    assert size_of(cell("full")) is None


def test_the_test_split_is_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = evaluate
    monkeypatch.setattr(cell_module, "evaluate", lambda setup, rows: (calls.append(len(rows)), real(setup, rows))[1])
    run_cell(cell(recipe={"lr_factors": (0.5, 1, 2), "validations": 2}), tmp_path, RunOptions(device="cpu"))
    assert len(calls) == 1  # `fit` looks `evaluate` up in its own module, so validation does not count here


def test_a_method_that_leaves_nothing_to_train_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = METHODS.get("head_only")
    monkeypatch.setattr(cls, "adapt", lambda self, backbone: backbone.requires_grad_(False))
    record = run_cell(cell("head_only"), tmp_path, RunOptions(device="cpu"))
    assert record.outcome == "failed" and "nothing to train" in record.reason


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_cells_are_measured_with_peaks(tmp_path: Path) -> None:
    record = run_cell(cell(), tmp_path, RunOptions(device="cuda"))
    assert record.outcome == "ok", record.reason
    assert record.memory and record.memory.peak_allocated_bytes and record.memory.peak_reserved_bytes
    assert record.environment["cuda_runtime"]
