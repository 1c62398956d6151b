"""Profiles: exact figures that repeat, seconds of real steps, and a table of methods side by side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from rich.console import Console

from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.recipe import Recipe
from petlbench.core.record import Memory
from petlbench.describe import profile as profiling
from petlbench.describe.cost_table import Costs, cost_table
from petlbench.describe.profile import profile, profile_cells
from petlbench.measure.clock import WARMUP
from petlbench.measure.memory import planned
from petlbench.training import state
from petlbench.training.loop import Diverged, train_step
from petlbench.training.state import TrainingState

SMALL = {"train_scenes": 4, "validation_scenes": 1, "test_scenes": 1}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETLBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def cell(method: str, **changes: Any) -> Cell:
    recipe = Recipe(steps=20, batch_size=4, eval_batch_size=3)
    fields = {"task": "vqa", "dataset": "digits", "dataset_config": SMALL, "backbone": "tiny", "recipe": recipe}
    return Cell(method=method, **{**fields, **changes})


def measured(*methods: str, **options: Any) -> list[Costs]:
    return profile([cell(method) for method in methods], **{"device": "cpu", "threads": 1, "steps": 2, **options})


@pytest.fixture(scope="module")
def costs(cache: None) -> dict[str, Costs]:
    return {c.method: c for c in measured("lora", "full", "vl_adapter")}


def exact(costs: Costs) -> Any:
    """Return the costs that must not depend on the machine, the threads or the other methods."""
    memory = costs.memory
    return costs.parameters, costs.flops, memory.saved_bytes, memory.accounted_bytes, memory.optimizer_bytes


def test_exact_figures_depend_neither_on_threads_nor_on_what_was_measured_before(costs: dict[str, Costs]) -> None:
    alone = measured("vl_adapter", threads=2, steps=1)[0]
    assert list(costs) == ["lora", "full", "vl_adapter"]  # in the requested order
    assert exact(alone) == exact(costs["vl_adapter"])
    assert alone.environment["threads"] == 2 and costs["vl_adapter"].environment["threads"] == 1


def test_threads_are_set_back() -> None:
    before = torch.get_num_threads()
    measured("bitfit", threads=before + 1, meta=True)
    assert torch.get_num_threads() == before


def test_every_figure_is_there_after_a_run(costs: dict[str, Costs]) -> None:
    for c in costs.values():
        assert c.flops and 0 < c.flops.forward < c.flops.backward * 1.2
        assert c.memory.saved_bytes > 0 and c.memory.native_saved_bytes
        parts = (c.memory.weights_bytes, c.memory.gradients_bytes, c.memory.optimizer_bytes, c.memory.saved_bytes)
        assert c.memory.accounted_bytes == sum(parts)
        assert c.step_seconds and c.forward_seconds and c.backward_seconds and c.optimizer_seconds
        assert c.step_seconds > c.forward_seconds + c.backward_seconds
        assert c.parameters.stored == c.parameters.trainable
        assert c.parameters.stored_bytes == 4 * c.parameters.trainable


def test_methods_cost_what_they_are_known_to(costs: dict[str, Costs]) -> None:
    full, lora, adapter = costs["full"], costs["lora"], costs["vl_adapter"]
    assert full.flops and lora.flops
    assert full.parameters.percent == 100
    assert lora.flops.backward < full.flops.backward and lora.flops.forward > full.flops.forward
    assert lora.memory.saved_bytes < full.memory.saved_bytes
    assert (full.parameters.inference_extra, lora.parameters.inference_extra) == (0, 0)  # lora is merged
    assert adapter.parameters.inference_extra and adapter.inference and lora.inference
    assert lora.inference.merged_latency_seconds and lora.inference.merged_throughput
    assert adapter.inference.merged_latency_seconds is None
    assert lora.inference.batch_size == 3


def test_without_a_run_the_same_parameters_and_bytes_are_planned(costs: dict[str, Costs]) -> None:
    for plan in measured("full", "vl_adapter", meta=True):
        real = costs[plan.method]
        assert plan.parameters == real.parameters.model_copy(update={"effective": None})
        assert plan.memory.weights_bytes == real.memory.weights_bytes
        assert plan.memory.gradients_bytes == real.memory.gradients_bytes
        assert plan.memory.optimizer_bytes == real.memory.optimizer_bytes
        assert plan.flops is plan.inference is plan.step_seconds is None


def test_a_large_backbone_is_planned_without_allocating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: set[str] = set()
    real = planned

    def spy(modules: Any) -> Memory:
        modules = list(modules)
        devices.update(p.device.type for module in modules for p in module.parameters())
        return real(modules)

    monkeypatch.setattr(profiling, "planned", spy)
    cells = [cell(name, backbone="vl_bart") for name in ("full", "lora", "vl_adapter")]
    full, lora, _ = profile(cells, meta=True)
    assert devices == {"meta"}
    assert full.parameters.total > 10**8 and full.memory.gradients_bytes == 4 * full.parameters.total
    # 18 attentions of width 768, query and value, ranks of 128
    assert lora.parameters.stored and lora.parameters.total - full.parameters.total == 2 * 2 * 128 * 18 * 768


def test_the_timed_steps_of_the_methods_alternate_and_their_rate_stays_positive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[tuple[Any, float]] = []
    real = train_step

    def spy(training: TrainingState) -> None:
        real(training)
        steps.append((type(training.setup.method).__name__, training.optimizer.param_groups[0]["lr"]))

    monkeypatch.setattr(profiling, "train_step", spy)
    recipe = Recipe(steps=2, batch_size=4)  # fewer steps than are timed
    profile([cell("bitfit", recipe=recipe), cell("head_only", recipe=recipe)], device="cpu", steps=3)
    turns = [name for i, (name, _) in enumerate(steps) if i == 0 or steps[i - 1][0] != name]
    assert turns == ["BitFit", "HeadOnly", "BitFit", "HeadOnly"]
    assert all(lr > 0 for _, lr in steps)
    assert len(steps) == 2 * (3 + WARMUP + 1)


def test_energy_is_reported_only_if_it_was_measured_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(range(0, 10**6, 5))
    monkeypatch.setattr(state, "energy_counter", lambda device: lambda: float(next(readings)))
    assert measured("bitfit", steps=1)[0].step_joules is None
    monkeypatch.setattr(profiling, "SECONDS_OF_ENERGY", 0.0)
    assert measured("bitfit", steps=1)[0].step_joules == 5


def test_a_method_that_diverges_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(training: TrainingState) -> None:
        raise Diverged("the loss is nan at step 1")

    monkeypatch.setattr(profiling, "train_step", diverge)
    with pytest.raises(UserError, match="'bitfit' cannot be profiled: the loss is nan at step 1; lower its rate"):
        measured("bitfit", steps=1)


def test_a_method_that_does_not_fit_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"'lora' does not fit backbone 'tiny'.*no stack 'fusion'"):
        profile([cell("lora", method_config={"stacks": ["fusion"]})], meta=True)


def test_cells_take_wildcards_once_each_and_only_as_many_rows_as_a_batch() -> None:
    cells = profile_cells(["lora", "l*", "f*"], task="vqa", batch_size=5)
    names = [c.method + c.variant for c in cells]
    assert names[0] == "lora" and "full" in names and len(set(names)) == len(names)
    assert {(c.recipe.batch_size, c.recipe.train_limit) for c in cells} == {(5, 5)}
    with pytest.raises(UserError, match="did you mean 'lora'"):
        profile_cells(["lorra"], task="vqa")


def text(costs: Sequence[Costs], **options: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(cost_table(costs, ["full"], **options))
    return capture.get()


def line(table: str, title: str) -> list[str]:
    return next(row for row in table.splitlines() if row.strip().startswith(title)).split(title)[1].split()


def test_the_table_gives_values_and_percentages_of_the_baseline(costs: dict[str, Costs]) -> None:
    full, lora = costs["full"], costs["lora"]
    table = text([lora, full])
    share = f"{100 * lora.parameters.trainable / full.parameters.trainable:.3g}%"
    assert line(table, "trainable parameters")[-1] == share and table.count(share) >= 1
    assert table.index("full") < table.index("lora")  # the baseline comes first
    assert "%" not in text([lora]) and "CUDA peak" not in table and "energy" not in table


def test_what_was_not_measured_is_left_out(costs: dict[str, Costs]) -> None:
    table = text(measured("full", "lora", meta=True))
    assert "gradients" in table and "saved for backward" not in table and "training step" not in table


def test_more_methods_than_fit_beside_each_other_go_below_with_the_baseline_again(costs: dict[str, Costs]) -> None:
    full = costs["full"]
    others = [costs["lora"].model_copy(update={"method": f"m{i}"}) for i in range(6)]
    heads = [row.split() for row in text([*others, full]).splitlines() if row.split()[:1] == ["full"]]
    assert heads == [["full", "m0", "m1", "m2", "m3"], ["full", "m4", "m5"]]


def test_costs_survive_json(costs: dict[str, Costs]) -> None:
    assert Costs.model_validate_json(costs["lora"].model_dump_json()) == costs["lora"]


def test_showing_costs_needs_no_torch() -> None:
    code = "import sys, petlbench.describe.cost_table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
