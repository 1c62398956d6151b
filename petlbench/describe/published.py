"""Published figures beside ours: parameters on the meta device, bytes saved for backward from a real forward pass.

The figures stand in `published.csv`, each with its source; `petlbench verify published` compares them.
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
IMAGE_SIDE = 640  # pixels of the sample that saved bytes are measured on
WORDS = 100  # ids of the sample's text are drawn from the first so many
TOLERANCE = 0.02  # of bytes
DECIMALS = 2  # of percentages
ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # as torch orders its arguments
SAVED = "saved_for_backward_mib_per_sample"
EFFECTIVE = "effective_parameters"


@dataclass(frozen=True)
class Counted:
    """Counts of one cell; `effective`: of the method's own, those that can receive a gradient (where asked for)."""

    parameters: Parameters
    untouched: int  # parameters of the backbone before, its own heads included
    effective: int | None = None


COUNTED: Mapping[str, Callable[[Counted], float | None]] = {
    "trainable_parameters": lambda found: found.parameters.trainable,
    "total_parameters": lambda found: found.parameters.total,  # inserted ones and heads included
    "host_parameters": lambda found: found.parameters.host,  # those that train with every method
    "host_and_head_parameters": lambda found: found.parameters.host + found.parameters.head,
    "method_parameters": lambda found: found.parameters.method,  # its own
    EFFECTIVE: lambda found: found.effective,
    "trainable_percent": lambda found: found.parameters.percent,  # of the total
    "trainable_percent_of_untouched": lambda found: 100 * found.parameters.trainable / found.untouched,
    "method_percent_of_untouched": lambda found: 100 * found.parameters.method / found.untouched,
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
    """One published figure: of a method on a backbone, for a task (which decides the head)."""

    method: str
    variant: str
    method_config: Options
    backbone: str
    backbone_config: Options
    task: str
    quantity: str
    kind: Literal["count", "percent", "bytes", "claim"]
    value: str  # a number, or of a claim a range such as 2-3
    unit: Literal["parameters", "million parameters", "percent", "MiB", "GB"]
    source: str

    @property
    def label(self) -> str:
        return MethodSpec(name=self.method, variant=self.variant).label

    @property
    def limits(self) -> tuple[float, float]:
        """The published number twice, or both ends of a range."""
        low, _, high = self.value.partition("-")
        return float(low), float(high or low)

    @cached_property
    def cell(self) -> Cell:
        """With the options that the method's variant stands for, and those of the backbone that the method needs."""
        kind = METHODS.get(self.method)
        options = overlaid(kind.variants.get(self.variant, {}), self.method_config)
        needed = make_method(kind, options, [self.task]).host_options(self.backbone.partition(":")[0])
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
    """A figure with ours in the same unit (None: not measured); of bytes also the native ones with fused attention."""

    figure: Figure
    ours: float | None
    native: float | None = None

    @property
    def difference(self) -> float | None:
        """Ours less the published one; None for a range and for what is not measured."""
        low, high = self.figure.limits
        return None if self.ours is None or low != high else self.ours - low

    @cached_property
    def verdict(self) -> Verdict:
        kind, (low, high) = self.figure.kind, self.figure.limits
        if kind == "claim":
            if self.ours is None:
                return "not measured"
            decimals = len(self.figure.value.partition("-")[0].partition(".")[2])  # as precise as the claim is
            return "measured" if low <= round(self.ours, decimals) <= high else "contradicted"
        assert self.ours is not None
        if kind == "bytes":
            return "within 2 %" if abs(self.ours - low) <= TOLERANCE * low else "DIFFERS"
        return "equal" if (round(self.ours, DECIMALS) if kind == "percent" else self.ours) == low else "DIFFERS"

    def as_json(self) -> dict[str, Any]:
        found = {"ours": self.ours, "difference": self.difference, "verdict": self.verdict, "native": self.native}
        return self.figure.model_dump(mode="json") | found


def read_figures(path: Path = FIGURES) -> list[Figure]:
    """The published figures, in the file's order."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Figure.model_validate(row) for row in csv.DictReader(file)]


def verify(figures: Sequence[Figure], methods: Sequence[str] | None = None) -> list[FigureCheck]:
    """Ours for each of the figures, or of those whose method (or method:variant) a pattern names.

    Each backbone is built once. Raises UserError for a pattern that names none.
    """
    chosen = list(figures) if methods is None else _named(figures, methods)
    found = [finding for _, group in groupby(sorted(chosen, key=_body), key=_body) for finding in _of(list(group))]
    order = {id(figure): i for i, figure in enumerate(chosen)}
    return sorted(found, key=lambda finding: order[id(finding.figure)])


def _named(figures: Sequence[Figure], patterns: Sequence[str]) -> list[Figure]:
    for pattern in patterns:
        if not any(_matches(figure, pattern) for figure in figures):
            if not METHODS.names(pattern):
                METHODS.origin(pattern.partition(":")[0])  # says so when there is no such method
            there = ", ".join(dict.fromkeys(figure.label for figure in figures))
            raise UserError(f"there is no published figure for '{pattern}': there are some for {there}")
    return [figure for figure in figures if any(_matches(figure, pattern) for pattern in patterns)]


def _matches(figure: Figure, pattern: str) -> bool:
    return fnmatchcase(figure.method, pattern) or fnmatchcase(figure.label, pattern)


def _body(figure: Figure) -> str:
    return json.dumps([figure.backbone, figure.cell.backbone_config], sort_keys=True)


def _of(figures: list[Figure]) -> list[FigureCheck]:
    """Those of figures that share a backbone."""
    device = torch.device("meta")
    backbone = build_backbone(figures[0].cell, device)
    effective = {figure.cell.id for figure in figures if figure.quantity == EFFECTIVE}
    known: dict[str, Counted] = {}
    found = []
    for figure in figures:
        if figure.quantity == SAVED:
            canonical, native = saved_mib(figure.cell)
            found.append(FigureCheck(figure, canonical, native))
            continue
        measure, cell = COUNTED.get(figure.quantity), figure.cell
        if measure is not None and cell.id not in known:
            known[cell.id] = _counted(cell, backbone, device, effective=cell.id in effective)
        ours = None if measure is None else measure(known[cell.id])
        found.append(FigureCheck(figure, None if ours is None else ours / UNITS[figure.unit]))
    return found


def _counted(cell: Cell, backbone: Backbone, device: torch.device, *, effective: bool) -> Counted:
    """Counts of a cell on a backbone that is left as it was."""
    untouched = sum(p.numel() for p in backbone.parameters())
    setup, handle = build_setup(cell, backbone, TASKS.get(cell.task)(), RunContext.on(device))
    try:
        return Counted(counted(setup), untouched, _effective(cell) if effective else None)
    finally:
        handle.restore()


def _effective(cell: Cell) -> int:
    """Scalars of the method's own that the loss of one sample can send a gradient to."""
    with torch.random.fork_rng():
        setup, batch = _real(cell)
        loss = setup.task.loss(setup.backbone, setup.head, batch)
        trainable = setup.trainable()
        return parameters.effective(loss, [trainable[name] for name in sorted(setup.method_parameters())])


def saved_mib(cell: Cell) -> tuple[float, float]:
    """MiB that a training step saves for backward on one sample, on the CPU: canonical, and native but fused."""
    with torch.random.fork_rng():
        setup, batch = _real(cell)
        canonical = canonical_saved_bytes(setup, batch)
        modules = setup.modules().train()
        with _Fused(), SavedTensors(*modules.values()) as native:
            setup.task.loss(setup.backbone, setup.head, batch)
    return canonical / MIB, native.saved_bytes / MIB


def _real(cell: Cell) -> tuple[TrainingSetup, Batch]:
    """The cell on the CPU with one sample: noise of 640 x 640 pixels, and a text as long as the backbone takes. Values
    decide nothing, so the weights are random."""
    cell = cell.model_copy(update={"backbone_config": {**cell.backbone_config, "weights": "none"}})
    device = torch.device("cpu")
    setup, _ = build_setup(cell, build_backbone(cell, device), TASKS.get(cell.task)(), RunContext.on(device))
    return setup, _sample(setup.backbone)


def _sample(backbone: Backbone) -> Batch:
    """One row of a referring expression without padding. Ids are drawn, for a tokenizer may not be at hand."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8))
    ids = torch.from_numpy(rng.integers(1, WORDS, (1, backbone.max_text)))
    texts = {"expression": Texts(ids, torch.ones_like(ids, dtype=torch.bool))}
    return Batch(backbone.images([noise]), texts, {"boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])})


class _Fused(TorchFunctionMode):
    """Attention without its dropout: with it a CPU has no fused kernel, and where there is one it keeps no mask."""

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


def failed(findings: Iterable[FigureCheck]) -> bool:
    """Whether any count, percentage or number of bytes differs."""
    return any(finding.verdict == "DIFFERS" for finding in findings)


def figure_table(findings: Sequence[FigureCheck]) -> Table:
    """A table per backbone."""
    from rich.table import Table
    from rich.text import Text

    result = Table.grid()
    for _, group in groupby(findings, key=lambda finding: _body(finding.figure)):
        rows = list(group)
        result.add_row(Text(" ".join([rows[0].figure.backbone, *_options(rows[0].figure)]), style="italic"))
        result.add_row(_section(rows))
    result.add_row(Text(LEGEND, style="dim"))
    return result


def _options(figure: Figure) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in figure.backbone_config.items()]


def _section(rows: Sequence[FigureCheck]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    section = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("method", "quantity", "published", "ours", "difference", "verdict", "source"):
        number = name in ("published", "ours", "difference")
        section.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
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
    """Decimals that show whether a figure is met."""
    return 0 if figure.unit == "parameters" else 2 if figure.unit == "percent" else 1
