"""Compare published figures with ours: parameters on the meta device, bytes saved for backward in a forward pass.

The figures are in `published.csv`, each with its source; `petlbench verify published` compares them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BeforeValidator
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from petlbench.api.backbone import Backbone
from petlbench.api.method import make_method
from petlbench.api.registries import METHODS, TASKS
from petlbench.api.task import Batch
from petlbench.api.tokens import Texts
from petlbench.core.cell import Cell, MethodSpec
from petlbench.core.errors import UserError
from petlbench.core.recipe import Frozen
from petlbench.core.record import Parameters
from petlbench.core.tables import plain_table
from petlbench.measure import parameters
from petlbench.measure.memory import SavedTensors
from petlbench.pipeline.assembly import build_backbone, build_setup
from petlbench.pipeline.plan.variants import overlaid
from petlbench.training.context import RunContext
from petlbench.training.setup import TrainingSetup
from petlbench.training.step_costs import canonical_saved_bytes, counted

if TYPE_CHECKING:
    from rich.table import Table

FIGURES = Path(__file__).with_suffix(".csv")
MIB = 2**20
IMAGE_SIDE = 640  # pixels, of the sample on which saved bytes are measured
WORDS = 100  # the ids of the sample's text are drawn from the first 100 of the vocabulary
TOLERANCE = 0.02  # relative, for bytes
DECIMALS = 2  # compared in percentages
ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # in the order of torch's arguments
SAVED = "saved_for_backward_mib_per_sample"
EFFECTIVE = "effective_parameters"


@dataclass(frozen=True)
class Counted:
    """Counts of one cell; `effective` counts the method's own that a gradient can reach (None if not asked for)."""

    parameters: Parameters
    untouched: int  # parameters of the backbone before the method, its own heads included
    effective: int | None = None


COUNTED: Mapping[str, Callable[[Counted], float | None]] = {
    "trainable_parameters": lambda counts: counts.parameters.trainable,
    "total_parameters": lambda counts: counts.parameters.total,  # with inserted ones and heads
    "host_parameters": lambda counts: counts.parameters.host,  # those that train with every method
    "host_and_head_parameters": lambda counts: counts.parameters.host + counts.parameters.head,
    "method_parameters": lambda counts: counts.parameters.method,  # its own
    EFFECTIVE: lambda counts: counts.effective,
    "trainable_percent": lambda counts: counts.parameters.percent,  # of the total
    "trainable_percent_of_untouched": lambda counts: 100 * counts.parameters.trainable / counts.untouched,
    "method_percent_of_untouched": lambda counts: 100 * counts.parameters.method / counts.untouched,
}
UNITS = {"parameters": 1, "million parameters": 1_000_000, "percent": 1, "MiB": 1, "GB": 1}

Verdict = Literal["equal", "within 2 %", "DIFFERS", "measured", "contradicted", "not measured"]
Options = Annotated[dict[str, Any], BeforeValidator(lambda text: json.loads(text or "{}"))]
LEGEND = (
    "equal: counts to the last digit, percentages to two decimals; within 2 %: bytes saved for backward, counted with "
    "one-byte dropout masks and unfused attention; claims from abstracts and figures (measured, contradicted, "
    "not measured) are never an error"
)


class Figure(Frozen):
    """One published figure of a method on a backbone, for a task, which decides the head."""

    method: str
    variant: str
    method_config: Options
    backbone: str
    backbone_config: Options
    task: str
    quantity: str
    kind: Literal["count", "percent", "bytes", "claim"]
    value: str  # a number; a claim may give a range such as 2-3
    unit: Literal["parameters", "million parameters", "percent", "MiB", "GB"]
    source: str

    @property
    def label(self) -> str:
        return MethodSpec(name=self.method, variant=self.variant).label

    @property
    def limits(self) -> tuple[float, float]:
        """Return both ends of a range; a single number is both."""
        low, _, high = self.value.partition("-")
        return float(low), float(high or low)

    @cached_property
    def cell(self) -> Cell:
        """Build the cell with the options of the method's variant and the backbone options that the method needs."""
        cls = METHODS.get(self.method)
        options = overlaid(cls.variants.get(self.variant, {}), self.method_config)
        needed = make_method(cls, options, [self.task]).host_options(self.backbone.partition(":")[0])
        return Cell(
            method=self.method,
            variant=self.variant,
            method_config=options,
            task=self.task,
            dataset=TASKS.get(self.task).default_dataset,
            backbone=self.backbone,
            backbone_config={**needed, **self.backbone_config},
        )


@dataclass(frozen=True)
class FigureCheck:
    """A figure and ours in the same unit (None: not measured); for bytes also the native ones with fused attention."""

    figure: Figure
    ours: float | None
    native: float | None = None

    @property
    def difference(self) -> float | None:
        """Return ours minus the published number; None for a range or if ours was not measured."""
        low, high = self.figure.limits
        return None if self.ours is None or low != high else self.ours - low

    @cached_property
    def verdict(self) -> Verdict:
        kind, (low, high) = self.figure.kind, self.figure.limits
        if kind == "claim":
            if self.ours is None:
                return "not measured"
            decimals = len(self.figure.value.partition("-")[0].partition(".")[2])  # the claim's own precision
            return "measured" if low <= round(self.ours, decimals) <= high else "contradicted"
        assert self.ours is not None
        if kind == "bytes":
            return "within 2 %" if abs(self.ours - low) <= TOLERANCE * low else "DIFFERS"
        return "equal" if (round(self.ours, DECIMALS) if kind == "percent" else self.ours) == low else "DIFFERS"

    def as_json(self) -> dict[str, Any]:
        ours = {"ours": self.ours, "difference": self.difference, "verdict": self.verdict, "native": self.native}
        return self.figure.model_dump(mode="json") | ours


def read_figures(path: Path = FIGURES) -> list[Figure]:
    """Read the published figures in the file's order."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Figure.model_validate(row) for row in csv.DictReader(file)]


def verify(figures: Sequence[Figure], methods: Sequence[str] | None = None) -> list[FigureCheck]:
    """Compute ours for the figures whose method (or method:variant) matches a pattern; without patterns, for all.

    Each backbone is built once. Raise UserError if a pattern matches no figure.
    """
    chosen = list(figures) if methods is None else _select(figures, methods)
    groups = groupby(sorted(chosen, key=_backbone_key), key=_backbone_key)
    checks = [check for _, group in groups for check in _check_group(list(group))]
    order = {id(figure): i for i, figure in enumerate(chosen)}
    return sorted(checks, key=lambda check: order[id(check.figure)])


def _select(figures: Sequence[Figure], patterns: Sequence[str]) -> list[Figure]:
    for pattern in patterns:
        if not any(_matches(figure, pattern) for figure in figures):
            if not METHODS.names(pattern):
                METHODS.origin(pattern.partition(":")[0])  # raises if there is no such method
            labels = ", ".join(dict.fromkeys(figure.label for figure in figures))
            raise UserError(f"there is no published figure for '{pattern}': choose from {labels}")
    return [figure for figure in figures if any(_matches(figure, pattern) for pattern in patterns)]


def _matches(figure: Figure, pattern: str) -> bool:
    return fnmatchcase(figure.method, pattern) or fnmatchcase(figure.label, pattern)


def _backbone_key(figure: Figure) -> str:
    return json.dumps([figure.backbone, figure.cell.backbone_config], sort_keys=True)


def _check_group(figures: list[Figure]) -> list[FigureCheck]:
    """Check figures that share a backbone."""
    device = torch.device("meta")
    backbone = build_backbone(figures[0].cell, device)
    effective = {figure.cell.id for figure in figures if figure.quantity == EFFECTIVE}
    counts: dict[str, Counted] = {}  # by cell id
    checks = []
    for figure in figures:
        if figure.quantity == SAVED:
            canonical, native = saved_mib(figure.cell)
            checks.append(FigureCheck(figure, canonical, native))
            continue
        measure, cell = COUNTED.get(figure.quantity), figure.cell
        if measure is not None and cell.id not in counts:
            counts[cell.id] = _count(cell, backbone, device, effective=cell.id in effective)
        ours = None if measure is None else measure(counts[cell.id])
        checks.append(FigureCheck(figure, None if ours is None else ours / UNITS[figure.unit]))
    return checks


def _count(cell: Cell, backbone: Backbone, device: torch.device, *, effective: bool) -> Counted:
    """Count the parameters of a cell and leave the backbone as it was."""
    untouched = sum(p.numel() for p in backbone.parameters())
    setup, handle = build_setup(cell, backbone, TASKS.get(cell.task)(), RunContext.on(device))
    try:
        return Counted(counted(setup), untouched, _effective(cell) if effective else None)
    finally:
        handle.restore()


def _effective(cell: Cell) -> int:
    """Count the method's own scalars that a gradient of one sample's loss can reach."""
    with torch.random.fork_rng():
        setup, batch = _setup_and_batch(cell)
        loss = setup.task.loss(setup.backbone, setup.head, batch)
        trainable = setup.trainable()
        return parameters.effective(loss, [trainable[name] for name in sorted(setup.method_parameters())])


def saved_mib(cell: Cell) -> tuple[float, float]:
    """Return the MiB that a step saves for backward for one sample, on the CPU: canonical, and native but fused."""
    with torch.random.fork_rng():
        setup, batch = _setup_and_batch(cell)
        canonical = canonical_saved_bytes(setup, batch)
        modules = setup.modules().train()
        with _Fused(), SavedTensors(*modules.values()) as native:
            setup.task.loss(setup.backbone, setup.head, batch)
    return canonical / MIB, native.saved_bytes / MIB


def _setup_and_batch(cell: Cell) -> tuple[TrainingSetup, Batch]:
    """Build the cell on the CPU with one sample: noise of 640 x 640 pixels and a text of the backbone's maximal length.

    Values do not change what is counted, so the weights are random.
    """
    cell = cell.model_copy(update={"backbone_config": {**cell.backbone_config, "weights": "none"}})
    device = torch.device("cpu")
    setup, _ = build_setup(cell, build_backbone(cell, device), TASKS.get(cell.task)(), RunContext.on(device))
    return setup, _sample(setup.backbone)


def _sample(backbone: Backbone) -> Batch:
    """Make one row of a referring expression without padding. Ids are random, as there may be no tokenizer."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8))
    ids = torch.from_numpy(rng.integers(1, WORDS, (1, backbone.max_text)))
    texts = {"expression": Texts(ids, torch.ones_like(ids, dtype=torch.bool))}
    return Batch(backbone.images([noise]), texts, {"boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])})


class _Fused(TorchFunctionMode):
    """Run attention without its dropout, as a CPU has no fused kernel with it; a fused kernel keeps no mask anyway."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            options |= dict(zip(ATTENTION, args, strict=False)) | {"dropout_p": 0.0}
            args = ()
        return func(*args, **options)


def failed(checks: Iterable[FigureCheck]) -> bool:
    """Return whether any count, percentage or number of bytes differs."""
    return any(check.verdict == "DIFFERS" for check in checks)


def figure_table(checks: Sequence[FigureCheck]) -> Table:
    """Return a grid with one table per backbone."""
    from rich.table import Table
    from rich.text import Text

    result = Table.grid()
    for _, group in groupby(checks, key=lambda check: _backbone_key(check.figure)):
        rows = list(group)
        result.add_row(Text(" ".join([rows[0].figure.backbone, *_options(rows[0].figure)]), style="italic"))
        result.add_row(_section(rows))
    result.add_row(Text(LEGEND, style="dim"))
    return result


def _options(figure: Figure) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in figure.backbone_config.items()]


def _section(rows: Sequence[FigureCheck]) -> Table:
    from rich.text import Text

    numbers = ("published", "ours", "difference")
    section = plain_table(("method", "quantity", *numbers, "verdict", "source"), numbers)
    for row in rows:
        figure = row.figure
        source = figure.source
        if row.native is not None:
            source += f"; natively with fused attention, its own dropout off: {row.native:.1f} {figure.unit}"
        published = f"{float(figure.value):,.{_places(figure)}f}" if row.difference is not None else figure.value
        texts = [
            figure.label,
            figure.quantity,
            f"{published} {figure.unit}",
            "" if row.ours is None else f"{row.ours:,.{_places(figure)}f}",
            "" if row.difference is None else _signed(row.difference, _places(figure)),
            row.verdict,
            source,
        ]
        style = "bold red" if row.verdict == "DIFFERS" else "dim" if figure.kind == "claim" else ""
        section.add_row(*map(Text, texts), style=style)
    return section


def _signed(difference: float, places: int) -> str:
    return f"{difference:+,.{places}f}" if round(difference, places) else "0"


def _places(figure: Figure) -> int:
    """Return the number of decimals that shows whether a figure is met."""
    return 0 if figure.unit == "parameters" else 2 if figure.unit == "percent" else 1
