"""From a cell to the objects it names: data, backbone, and the setting in which a method is trained."""

from __future__ import annotations

import json
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from petlbench.backbones.base import Backbone
from petlbench.backbones.lent import lend
from petlbench.backbones.sites import Snapshot
from petlbench.checkpoint import seed_everything
from petlbench.datasets.base import Source, Split
from petlbench.errors import UserError
from petlbench.measure.clock import PhaseClock
from petlbench.method import Method, adapt, make_method
from petlbench.precision import prepare
from petlbench.registry import BACKBONES, DATASETS, METHODS
from petlbench.spec import Cell, MethodSpec
from petlbench.task import Task
from petlbench.training import Report, Setting

TRIAL_SECONDS = 10.0  # that a method may take to go into a backbone without memory


@dataclass(frozen=True)
class Data:
    """The three parts of a data set in a task's schema."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load_source(cell: Cell, data_root: Path | None) -> Source:
    """The cell's data source. `data_root`: where data sets lie (None: PETLBENCH_DATA)."""
    kind = DATASETS.get(cell.dataset)
    return kind(kind.Config(**cell.dataset_config), data_root)


def load_split(cell: Cell, source: Source, task: Task, split: Split) -> Dataset:
    """One part, limited as the recipe says. Raises UserError for one that is empty or has the wrong columns."""
    limit = cell.recipe.train_limit if split == "train" else cell.recipe.eval_limit
    rows = source.load(task.name, split, limit)
    if not len(rows):
        raise UserError(f"data set '{cell.dataset}' has no {split} rows for task '{task.name}'")
    if set(rows.features) != set(task.features):
        raise UserError(
            f"data set '{cell.dataset}' gives the columns {', '.join(rows.features)} for task "
            f"'{task.name}', which needs {', '.join(task.features)}"
        )
    return rows


def load_data(cell: Cell, source: Source, task: Task) -> Data:
    """All three parts."""
    return Data(*(load_split(cell, source, task, split) for split in ("train", "validation", "test")))


def build_backbone(cell: Cell, device: torch.device) -> Backbone:
    """The cell's backbone; what its weights leave open is drawn from the cell's seed."""
    kind: Any = BACKBONES.get(cell.backbone)
    seed_everything(cell.seed)
    with _drawing_on(device):
        backbone: Backbone = kind(kind.configured(cell.backbone, cell.backbone_config))
    return backbone.to(device)


def build_method(cell: Cell, kind: type[Method] | None = None) -> Method:
    """The cell's method as configured, told the cell's task. `kind`: its class, where it is not registered."""
    return make_method(kind or METHODS.get(cell.method), cell.method_config, [cell.task])


def _drawing_on(device: torch.device) -> AbstractContextManager[Any]:
    """Where new values are drawn: on the CPU, so that they are the same on every device; the meta device has none."""
    return device if device.type == "meta" else torch.device("cpu")


def equip(backbone: Backbone, task: Task, device: torch.device) -> tuple[Backbone, nn.Module]:
    """An adapted backbone with what it lacks for `task` lent, and the task's head.

    Where the head is one that the backbone was published with, it trains as the backbone says, and the backbone's
    heads for other tasks do not.
    """
    own = backbone.own_head(task.name)
    for head in backbone.own_heads.values():
        if head is not own:
            head.requires_grad_(False)
        elif backbone.trains_heads:
            head.requires_grad_(True)
    with _drawing_on(device):
        extended = lend(backbone, task.needs)
        head = task.head(backbone)
    return extended.to(device), head.to(device)


def misfits(cells: Sequence[Cell], kind: type[Method] | None = None) -> dict[str, str]:
    """Every method tried on every backbone of `cells`, without memory and weights, before anything runs: what is wrong,
    by the cell's id, with those that do not fit. `kind`: the class of all their methods, where it is not registered."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        # Weights that are read into a backbone without memory go nowhere, as they should.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        for _, group in groupby(sorted(cells, key=_body), key=_body):
            backbone: Backbone | None = None
            tried: dict[str, str | None] = {}
            for cell in group:
                method = f"{cell.method} {sorted(cell.method_config.items(), key=str)} {cell.task}"
                if method not in tried:
                    backbone = backbone or build_backbone(cell, torch.device("meta"))
                    tried[method] = _misfit(cell, backbone, kind)
                if reason := tried[method]:
                    label = MethodSpec(name=cell.method, variant=cell.variant).label
                    found[cell.id] = f"method '{label}' does not fit backbone '{cell.backbone}': {reason}"
    return found


def _body(cell: Cell) -> str:
    return json.dumps([cell.backbone, cell.backbone_config], sort_keys=True)


class _TooLong(BaseException):
    """No Exception, which somebody else's code might catch."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _TooLong in the block after so many seconds; without effect outside of the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if previous is None else previous)


def _misfit(cell: Cell, backbone: Backbone, kind: type[Method] | None) -> str | None:
    handle = Snapshot(backbone)
    try:
        with _drawing_on(torch.device("meta")), _at_most(TRIAL_SECONDS):
            build_method(cell, kind).adapt(backbone)
        return None
    except ValueError as error:
        return " ".join(str(error).split())
    except (Exception, _TooLong):  # a fault of the method's, of which its cell will leave a record
        return None
    finally:
        handle.restore()


def build_setting(
    cell: Cell,
    backbone: Backbone,
    task: Task,
    device: torch.device,
    *,
    method: Method | None = None,
    clock: PhaseClock | None = None,
    report: Report = lambda event: None,
    workers: int = 0,
) -> tuple[Setting, Snapshot]:
    """The backbone adapted, with the task's head, ready to train; and the handle that restores the backbone.

    `method` defaults to the cell's own. Raises UserError when nothing is left to train, or nothing can be compiled.
    """
    method = method or build_method(cell)
    seed_everything(cell.seed)
    with _drawing_on(device):
        adapted, handle = adapt(method, backbone)
    extended, head = equip(adapted, task, device)
    prepare(extended, cell.recipe, device)
    seed_everything(cell.seed + 1)  # dropout, whatever the method drew
    setting = Setting(
        extended,
        head,
        task,
        cell.recipe,
        cell.seed,
        device,
        clock or PhaseClock(device),
        report,
        method=method,
        workers=workers,
    )
    if not setting.trainable():
        raise UserError(f"method '{cell.method}' leaves nothing to train on task '{task.name}'")
    return setting, handle
