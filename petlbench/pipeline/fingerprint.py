"""What a result depends on, as digests: a record whose code, data or weights have changed since is stale.

Code is read, never run: a fingerprint costs no import of torch, and a plug-in that cannot be imported still has one.
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
    """Digests of the code of `cell`'s method, task, metric, backbone and source, and of `training`.

    Each covers what the registered class computes with of petlbench and of its own top-level package, as
    `petlbench.core.source_code.closure` finds it: where that stands, how it is called and what it tells people do not
    count.
    Raises UserError for a name that is not registered, and for a file that is missing or no valid Python.
    """
    starts = {
        "method": METHODS.target(cell.method),
        "task": TASKS.target(cell.task),
        "backbone": BACKBONES.target(cell.backbone),
        "source": DATASETS.target(cell.dataset),
        "training": TRAINING,
    }
    found = {part: closure(target) for part, target in starts.items()}
    return {**{part: one.digest for part, one in found.items()}, "metric": metric_digest(found["task"])}


def metric_digest(task: Closure) -> str:
    """Of what a task uses of a package `metrics`, whatever else it does; of the whole task where it uses none."""
    metrics = [one for one in task.definitions if METRICS in one.module.split(".")]
    return digest_of(sorted(of(one).digest for one in metrics)) if metrics else task.digest


def fingerprints(cell: Cell, data_root: Path | None = None, source: Source | None = None) -> dict[str, str]:
    """`code_fingerprints`, and digests of the `data` and of the backbone's `weights` files. Imports torch.

    `source`: the cell's, where it is at hand, as a source keeps the digest of its data.
    Raises UserError as `code_fingerprints` does, and for data or weights that cannot be read.
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
    """The parts of `now` that differ from `record`'s fingerprints or are missing there; none: the record is fresh."""
    return tuple(part for part, digest in now.items() if record.fingerprints.get(part) != digest)
