"""Compute digests of what a result depends on: a record is stale if its code, data or weights have changed.

Code is read, never run: its fingerprint needs no import of torch, and a broken plug-in has one too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petlbench.api.registries import BACKBONES, DATASETS, METHODS, TASKS
from petlbench.core.cell import Cell
from petlbench.core.files import content_digest
from petlbench.core.record import Record
from petlbench.core.source_code.closure import Closure, closure, digest_of, of
from petlbench.core.source_code.files import place_of

if TYPE_CHECKING:
    from petlbench.api.source import Source

__all__ = ["TRAINING", "changed", "closure", "code_fingerprints", "fingerprints", "place_of"]
TRAINING = "petlbench.pipeline.cell:run_cell"  # where the code that trains, evaluates and measures every cell starts
METRICS = "metrics"  # the package, of petlbench or of a plug-in, that holds metrics


def code_fingerprints(cell: Cell) -> dict[str, str]:
    """Return digests of the code of `cell`'s method, task, metric, backbone and source, and of `training`.

    A digest covers the code that the registered class computes with, from petlbench and from the class's own top-level
    package, as `petlbench.core.source_code.closure` finds it. Files, names of definitions, and messages do not count.
    Raise UserError if a name is not registered, or if a file is missing or not valid Python.
    """
    starts = {
        "method": METHODS.target(cell.method),
        "task": TASKS.target(cell.task),
        "backbone": BACKBONES.target(cell.backbone),
        "source": DATASETS.target(cell.dataset),
        "training": TRAINING,
    }
    closures = {part: closure(target) for part, target in starts.items()}
    return {**{part: code.digest for part, code in closures.items()}, "metric": metric_digest(closures["task"])}


def metric_digest(task: Closure) -> str:
    """Return the digest of the code that a task uses from a package `metrics`; of the whole task if it uses none."""
    metrics = [definition for definition in task.definitions if METRICS in definition.module.split(".")]
    return digest_of(sorted(of(definition).digest for definition in metrics)) if metrics else task.digest


def fingerprints(cell: Cell, data_root: Path | None = None, source: Source | None = None) -> dict[str, str]:
    """Return `code_fingerprints`, and digests of the `data` and of the backbone's `weights` files. Imports torch.

    `source`: the cell's source if it is open already, because a source keeps the digest of its data.
    Raise UserError as `code_fingerprints` does, and if data or weights cannot be read.
    """
    from petlbench.pipeline.data import load_source

    source = source or load_source(cell, data_root)
    backbone: Any = BACKBONES.get(cell.backbone)
    files = backbone.files(backbone.configured(cell.backbone, cell.backbone_config))
    return {
        **code_fingerprints(cell),
        "data": source.fingerprint(cell.task),
        "weights": digest_of(map(content_digest, files)),
    }


def changed(record: Record, now: Mapping[str, str]) -> tuple[str, ...]:
    """Return the parts of `now` that `record` lacks or has with another digest; if there are none, it is fresh."""
    return tuple(part for part, digest in now.items() if record.fingerprints.get(part) != digest)
