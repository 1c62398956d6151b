"""A killed cell continues from its checkpoint and ends with the same numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from petlbench.core.errors import Unwritable
from petlbench.core.record import Record
from petlbench.measure.clock import PhaseClock
from petlbench.pipeline import trials
from petlbench.pipeline.cell import run_cell
from petlbench.pipeline.options import RunOptions
from petlbench.results.store import Store
from petlbench.training import checkpoint as checkpoint_module
from petlbench.training.checkpoint import Checkpoint, Saved, save_tensors
from petlbench.training.loop import Diverged, fit
from petlbench.training.seeds import rng_state, set_rng_state
from petlbench.training.state import TrainingResult, TrainingState
from tests.backbone_factory import posing
from tests.pipeline.test_runner import cell
from tests.training.test_training import recipe, rows, setup


class Killed(BaseException):
    """A kill signal, as an exception that no `except Exception` catches."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETLBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def noisy(shape: Any) -> Any:
    """Return a setup whose next step depends on torch's random numbers and on the optimizer's moments."""
    here = setup(shape)
    here.backbone = posing(torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)))
    torch.manual_seed(7)
    return here


def through_disk(state: Saved, path: Path) -> Saved:
    kept = Checkpoint(path, "key", 0.0)
    kept.save(state)
    saved = kept.load()
    assert saved
    return saved


@pytest.mark.parametrize("stop", [1, 5, 6, 11, 12])
def test_training_resumed_at_any_step_ends_as_if_it_had_not_stopped(stop: int, tmp_path: Path) -> None:
    shape = recipe(steps=12, validations=2)
    whole = fit(noisy(shape), rows(10), rows(5), lr=0.1)
    saved: list[Saved] = []

    def keep(training: TrainingState) -> None:
        if training.step == stop:
            saved.append(through_disk(training.state(), tmp_path / "c"))
            raise Killed

    with pytest.raises(Killed):
        fit(noisy(shape), rows(10), rows(5), lr=0.1, keep=keep)
    later = noisy(shape)
    torch.manual_seed(99)  # a new process starts from another random state
    result = fit(later, rows(10), rows(5), lr=0.1, resume=saved[0])
    assert (result.losses, result.validation, result.best_step) == (whole.losses, whole.validation, whole.best_step)
    assert result.memory == whole.memory
    assert result.state.keys() == whole.state.keys()
    assert all(torch.equal(value, whole.state[name]) for name, value in result.state.items())


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die right after it has written its `count`th checkpoint."""
    real, calls = Checkpoint.save, iter(range(1, 1000))

    def save(self: Checkpoint, state: Saved) -> None:
        real(self, state)
        if next(calls) == count:
            raise Killed

    monkeypatch.setattr(Checkpoint, "save", save)


@pytest.mark.parametrize("count", [2, 5])
def test_a_cell_killed_in_any_trial_leaves_the_same_record(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = cell(recipe={"lr_factors": (0.5, 1.0), "steps": 3})
    whole = run_cell(job, tmp_path / "whole", RunOptions(device="cpu"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(count, patch)
        run_cell(job, tmp_path / "cut", RunOptions(device="cpu", checkpoint_seconds=0))
    assert not Store.open(tmp_path / "cut", create=False).load()
    steps: list[int] = []
    result = run_cell(
        job,
        tmp_path / "cut",
        RunOptions(device="cpu", checkpoint_seconds=0),
        report=lambda event: steps.append(event["step"]) if event["phase"] == "train" else None,
    )
    assert len(steps) == 6 - count  # it continued and did not start anew
    assert result.timing and result.timing.resumed == 1
    for name in ("outcome", "metrics", "validation", "trials", "chosen_lr", "parameters", "flops"):
        assert getattr(result, name) == getattr(whole, name), name
    assert result.memory and whole.memory and result.memory.accounted_bytes == whole.memory.accounted_bytes
    assert not list((tmp_path / "cut" / "checkpoints").iterdir())


def test_a_checkpoint_of_other_code_is_not_continued_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(2, patch)
        run_cell(cell(), tmp_path, RunOptions(device="cpu", checkpoint_seconds=0))
    result = run_cell(cell(), tmp_path, RunOptions(device="cpu"), fingerprints={"method": "another"})
    assert result.outcome == "ok" and result.timing and result.timing.resumed == 0


def test_what_diverged_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fit

    def diverge(*args: Any, **options: Any) -> TrainingResult:
        real(*args, **options)
        raise Diverged("the loss is nan")

    monkeypatch.setattr(trials, "fit", diverge)
    record: Record = run_cell(cell(), tmp_path, RunOptions(device="cpu", checkpoint_seconds=0))
    assert record.outcome == "diverged" and not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("content", [b"", b"garbage", "foreign", "unparsable"])
def test_a_damaged_or_foreign_checkpoint_is_ignored(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        rest = json.dumps({}) if content == "foreign" else "{"
        save_file(
            {"x": torch.zeros(1)}, path, metadata={"key": "foreign" if content == "foreign" else "mine", "rest": rest}
        )
    assert Checkpoint(path, "mine", 0.0).load() is None
    assert Checkpoint(tmp_path / "absent", "mine", 0.0).load() is None


def test_a_checkpoint_is_written_when_it_is_due_and_seldom_when_it_is_slow(tmp_path: Path) -> None:
    seconds = [0.0]

    class Slow(dict[str, Any]):
        def items(self) -> Any:
            seconds[0] += 3.0
            return super().items()

    kept = Checkpoint(tmp_path / "c", "key", 60.0, now=lambda: seconds[0])
    seconds[0] = 59.0
    assert not kept.due()
    seconds[0] = 60.0
    assert kept.due()
    kept.save(Saved(Slow(x=torch.zeros(1))))
    seconds[0] += 100.0
    assert not kept.due()  # writing took three seconds: fifty times as much must pass
    seconds[0] += 50.0
    assert kept.due()


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoint(tmp_path / "c", "key", 0.0)
    kept.save(Saved({"x": torch.ones(2)}, {"step": 1}))

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(Unwritable, match="No space left on device; free some space"):
        kept.save(Saved({"x": torch.zeros(2)}, {"step": 2}))
    saved = kept.load()
    assert saved and saved.rest == {"step": 1} and torch.equal(saved.tensors["x"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_disk_that_fills_up_ends_the_run_and_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Checkpoint, state: Saved) -> None:
        raise Unwritable("cannot write there")

    monkeypatch.setattr(Checkpoint, "save", full)
    with pytest.raises(Unwritable):
        run_cell(cell(), tmp_path, RunOptions(device="cpu", checkpoint_seconds=0))
    assert Store.open(tmp_path, create=False).load() == []


def test_tensors_of_any_layout_are_stored_as_they_read(tmp_path: Path) -> None:
    value = torch.arange(6.0).reshape(2, 3).T
    assert save_tensors(tmp_path / "t", {"x": value}, {}) == (tmp_path / "t").stat().st_size
    kept = Checkpoint(tmp_path / "c", "key", 0.0)
    kept.save(Saved({"x": value}))
    saved = kept.load()
    assert saved and torch.equal(saved.tensors["x"], value)


def test_all_random_numbers_go_on_where_they_stood() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    draw()  # the generator keeps the second normal number of a pair: that is state too
    device = torch.device("cpu")
    state = Saved(dict(rng_state(device)))
    expected = [draw(), draw()]
    assert draw() != expected[0]
    set_rng_state(state.tensors, device)
    assert [draw(), draw()] == expected


def test_a_clock_of_a_resumed_cell_counts_on() -> None:
    seconds = [0.0]
    first = PhaseClock(now=lambda: seconds[0])
    with first.phase("forward"):
        seconds[0] += 5.0
    later = PhaseClock(now=lambda: seconds[0])
    later.restore(json.loads(json.dumps(first.state())))
    with later.phase("forward"):
        seconds[0] += 2.0
    timing = later.timing()
    assert (timing.phases["forward"], timing.total_seconds, timing.resumed) == (7.0, 7.0, 1)
