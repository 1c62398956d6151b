"""Show the costs of methods side by side. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pydantic import Field

from petlbench.core.cell import Cell
from petlbench.core.recipe import Frozen
from petlbench.core.record import Flops, Inference, Memory, Parameters
from petlbench.core.units import human_bytes, human_count, human_seconds

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = 5  # methods side by side, the baseline among them


class Costs(Frozen):
    """Costs of one cell; None where not measured. Without a run only parameters and planned bytes are known.

    `parameters.stored_bytes` counts the tensors of an adapter file, not its header. Seconds are medians of real
    training steps with the recipe's optimizer and rate.
    """

    cell: Cell
    method: str
    parameters: Parameters
    memory: Memory
    flops: Flops | None = None
    inference: Inference | None = None
    step_seconds: float | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    optimizer_seconds: float | None = None
    step_joules: float | None = None
    environment: dict[str, Any] = Field({}, description="what it was measured on; empty if nothing was run")


def _joules(number: float) -> str:
    return f"{number:.3g} J"


# The lines of a table: title, attribute of Costs, and the function that formats the value.
LINES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("trainable parameters", "parameters.trainable", human_count),
    ("  of the method", "parameters.method", human_count),
    ("  of the head", "parameters.head", human_count),
    ("  of the host", "parameters.host", human_count),
    ("  that a gradient reaches", "parameters.effective", human_count),
    ("stored parameters", "parameters.stored", human_count),
    ("stored tensors", "parameters.stored_bytes", human_bytes),
    ("extra at inference", "parameters.inference_extra", human_count),
    ("training memory", "memory.accounted_bytes", human_bytes),
    ("  weights", "memory.weights_bytes", human_bytes),
    ("  gradients", "memory.gradients_bytes", human_bytes),
    ("  optimizer", "memory.optimizer_bytes", human_bytes),
    ("  saved for backward", "memory.saved_bytes", human_bytes),
    ("  the same, as kept here", "memory.native_saved_bytes", human_bytes),
    ("CUDA peak", "memory.peak_allocated_bytes", human_bytes),
    ("FLOPs of a step", "flops.step", human_count),
    ("  forward", "flops.forward", human_count),
    ("  backward", "flops.backward", human_count),
    ("training step", "step_seconds", human_seconds),
    ("  forward", "forward_seconds", human_seconds),
    ("  backward", "backward_seconds", human_seconds),
    ("  optimizer", "optimizer_seconds", human_seconds),
    ("  energy", "step_joules", _joules),
    ("prediction of one", "inference.latency_seconds", human_seconds),
    ("  merged", "inference.merged_latency_seconds", human_seconds),
    ("predictions a second", "inference.throughput", human_count),
    ("  merged", "inference.merged_throughput", human_count),
)


def value(costs: Costs, path: str) -> float | None:
    """Return the value at `path`, a path of LINES; None if it was not measured."""
    if path == "memory.saved_bytes" and costs.flops is None:
        return None  # nothing ran, so the bytes are unknown, not zero
    result: Any = costs
    for name in path.split("."):
        result = getattr(result, name, None)
    return result


def cost_table(costs: Sequence[Costs], baselines: Collection[str] = ()) -> Table:
    """Return one table per setting, methods side by side, in percent of the first method that is in `baselines`."""
    from rich.table import Table
    from rich.text import Text

    result = Table.grid()
    for setting, group in groupby(costs, key=_setting):
        members = list(group)
        base = next((c for c in members if c.method in baselines), None)
        result.add_row(Text(_heading(members[0], setting, base), style="italic"))
        for block in _blocks(members, base):
            result.add_row(_side_by_side(block, base))
    if any(c.flops for c in costs):
        note = "bytes (but those kept here) and FLOPs are the same on every machine; seconds are this machine's"
    else:
        note = "planned, nothing was run: saved tensors, FLOPs and seconds are unknown"
    result.add_row(Text(note, style="dim"))
    return result


def _setting(costs: Costs) -> str:
    cell = costs.cell
    return f"{cell.task}:{cell.dataset} on {cell.backbone}"


def _heading(first: Costs, setting: str, base: Costs | None) -> str:
    parts = [setting, f"batch of {first.cell.recipe.batch_size}"]
    if first.environment:
        parts += [str(first.environment["device_name"]), f"threads: {first.environment['threads']}"]
    return ", ".join(parts) + (f"; in percent of {base.method}" if base else "")


def _blocks(members: list[Costs], base: Costs | None) -> Iterator[list[Costs]]:
    """Yield blocks of as many methods as fit side by side; the baseline comes first in each."""
    first, others = ([base], [c for c in members if c is not base]) if base else ([], members)
    size = COLUMNS - len(first)
    for start in range(0, max(1, len(others)), size):
        yield [*first, *others[start : start + size]]


def _side_by_side(block: Sequence[Costs], base: Costs | None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for costs in block:
        table.add_column(Text(costs.method), justify="right", no_wrap=True)
    for title, path, form in LINES:
        values = [value(costs, path) for costs in block]
        if any(v is not None for v in values):
            compared = [None if base is None or costs is base else value(base, path) for costs in block]
            texts = [_text(v, other, form) for v, other in zip(values, compared, strict=True)]
            table.add_row(Text(title), *map(Text, texts))
    return table


def _text(number: float | None, other: float | None, form: Callable[[float], str]) -> str:
    if number is None:
        return ""
    return f"{form(number)} {f'{100 * number / other:.3g}%':>6}" if other else form(number)
