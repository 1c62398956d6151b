"""Every method tried on every backbone before anything runs."""

from __future__ import annotations

import json
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from types import FrameType

import torch

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method
from petlbench.api.snapshot import Snapshot
from petlbench.core.cell import Cell, MethodSpec
from petlbench.pipeline.assembly import build_backbone, build_method, drawing_on

TRIAL_SECONDS = 10.0  # that a method may take to go into a backbone without memory


def incompatible_cells(cells: Sequence[Cell], kind: type[Method] | None = None) -> dict[str, str]:
    """Every method tried on every backbone of `cells`, without memory and weights, before anything runs: what is wrong,
    by the cell's id, with those that do not fit. `kind`: the class of all their methods, where it is not registered."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        # Weights that are read into a backbone without memory go nowhere, as they should.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        for _, group in groupby(sorted(cells, key=_backbone_key), key=_backbone_key):
            backbone: Backbone | None = None
            tried: dict[str, str | None] = {}
            for cell in group:
                method = f"{cell.method} {sorted(cell.method_config.items(), key=str)} {cell.task}"
                if method not in tried:
                    backbone = backbone or build_backbone(cell, torch.device("meta"))
                    tried[method] = _incompatibility(cell, backbone, kind)
                if reason := tried[method]:
                    label = MethodSpec(name=cell.method, variant=cell.variant).label
                    found[cell.id] = f"method '{label}' does not fit backbone '{cell.backbone}': {reason}"
    return found


def _backbone_key(cell: Cell) -> str:
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


def _incompatibility(cell: Cell, backbone: Backbone, kind: type[Method] | None) -> str | None:
    handle = Snapshot(backbone)
    try:
        with drawing_on(torch.device("meta")), _at_most(TRIAL_SECONDS):
            build_method(cell, kind).adapt(backbone)
        return None
    except ValueError as error:
        return " ".join(str(error).split())
    except (Exception, _TooLong):  # a fault of the method's, of which its cell will leave a record
        return None
    finally:
        handle.restore()
