"""A trial before anything runs: every method goes into every backbone once, without memory and weights."""

from __future__ import annotations

import json
import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from multiprocessing.connection import Connection

import torch

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method
from petlbench.api.snapshot import Snapshot
from petlbench.core.cell import Cell, MethodSpec
from petlbench.pipeline.assembly import build_backbone, build_method, drawing_on

TRIAL_SECONDS = 10.0  # that a method may take to go into a backbone without memory


def incompatible_cells(cells: Sequence[Cell], kind: type[Method] | None = None) -> dict[str, str]:
    """Return, by cell id, why the method of a cell does not fit its backbone; cells that fit are left out.

    `kind` is the class of all the methods, where it is not registered.
    """
    found: dict[str, str] = {}
    with quiet_meta():
        for _, group in groupby(sorted(cells, key=_backbone_key), key=_backbone_key):
            by_method: dict[str, list[Cell]] = {}
            for cell in group:
                key = f"{cell.method} {sorted(cell.method_config.items(), key=str)} {cell.task}"
                by_method.setdefault(key, []).append(cell)
            first = [alike[0] for alike in by_method.values()]
            reasons = _trials(first, build_backbone(first[0], torch.device("meta")), kind)
            for alike, reason in zip(by_method.values(), reasons, strict=True):
                for cell in alike if reason else []:
                    label = MethodSpec(name=cell.method, variant=cell.variant).label
                    found[cell.id] = f"method '{label}' does not fit backbone '{cell.backbone}': {reason}"
    return found


@contextmanager
def quiet_meta() -> Iterator[None]:
    """Silence torch where weights are read into a backbone without memory: they go nowhere, as they should."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        yield


def _backbone_key(cell: Cell) -> str:
    return json.dumps([cell.backbone, cell.backbone_config], sort_keys=True)


def _trials(cells: Sequence[Cell], backbone: Backbone, kind: type[Method] | None) -> list[str | None]:
    """Try the method of each cell; return why it does not fit, or None.

    The trials run in a forked process, which knows all classes of this one, a notebook's too. One that takes longer
    than TRIAL_SECONDS, or ends its process, has no verdict, and the next process goes on after it. Where CUDA has
    started no process can be forked, and the trials run here, without a limit.
    """
    if torch.cuda.is_initialized():
        return [_incompatibility(cell, backbone, kind) for cell in cells]
    context = multiprocessing.get_context("fork")
    reasons: list[str | None] = []
    while len(reasons) < len(cells):
        reader, writer = context.Pipe(duplex=False)
        child = context.Process(target=_report, args=(cells[len(reasons) :], backbone, kind, writer))
        child.start()
        writer.close()
        try:
            while len(reasons) < len(cells):
                reasons.append(reader.recv())
        except EOFError:
            reasons.append(None)
        finally:
            reader.close()
            child.kill()
            child.join()
    return reasons


def _report(cells: Sequence[Cell], backbone: Backbone, kind: type[Method] | None, writer: Connection) -> None:
    """Send the verdict on each cell. The kernel ends this process if one takes too long, even without a parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the threads of the parent's pool do not exist here, and work for them would wait forever
    for cell in cells:
        signal.setitimer(signal.ITIMER_REAL, TRIAL_SECONDS)
        writer.send(_incompatibility(cell, backbone, kind))


def _incompatibility(cell: Cell, backbone: Backbone, kind: type[Method] | None) -> str | None:
    handle = Snapshot(backbone)
    try:
        with drawing_on(torch.device("meta")):
            build_method(cell, kind).adapt(backbone)
        return None
    except ValueError as error:
        return " ".join(str(error).split())
    except Exception:  # a fault in the method, of which its cell will leave a record
        return None
    finally:
        handle.restore()
