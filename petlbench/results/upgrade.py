"""Older records: brought to today's schema step by step, and found under the names they had. Imports no torch.

A step takes the JSON object of a record of one version and returns it as the next version would have written it: what
has another meaning now moves or goes, what has no counterpart may stay (who reads an older record leaves such keys
out), and what was not measured then is left to its default. `schema_version` stays as it is: it tells an older record.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from petlbench.core.cell import Cell
from petlbench.core.record import SCHEMA_VERSION

Json = dict[str, Any]
DIGEST = re.compile("_[0-9a-f]{8}")

# The rule of `legacy_digest`, as it was: these fields of a cell and of its recipe always counted, ...
# fmt: off
CELL = ("method", "variant", "method_config", "task", "dataset", "dataset_config", "backbone", "backbone_config",
        "seed")
RECIPE = ("steps", "batch_size", "eval_batch_size", "lr", "weight_decay", "betas", "eps", "warmup", "schedule",
          "clip_norm", "validations", "train_limit", "eval_limit", "beams", "lr_factors")
# fmt: on
# ... and these where they did not have the value on the right.
OPTIONAL = {
    "warmup_from_zero": False,
    "lr_floor": 0.0,
    "layer_decay": 1.0,
    "augment": "none",
    "method_lr": 1.0,
    "released": False,
    "precision": "fp32",
    "attention": "fused",
    "gradient_checkpointing": False,
    "compile": False,
}


def from_1(data: Json) -> Json:
    """Version 1 accounted what a step saved on that machine, which is `native_saved_bytes` now.

    The canonical bytes, and the sum with them, were not measured. `step_flops` (not split into forward and backward)
    and `timing.latency_seconds` (without a throughput) have no place any more.
    """
    memory = data.get("memory")
    if not isinstance(memory, dict):
        return data
    moved = {"native_saved_bytes": memory.get("saved_bytes"), "saved_bytes": None, "accounted_bytes": None}
    return {**data, "memory": {**memory, **moved}}


STEPS: dict[int, Callable[[Json], Json]] = {1: from_1}  # by the version that each starts from


def upgraded(data: Json) -> Json:
    """`data`, a record of a version that STEPS knows, in the form of today's, its `schema_version` unchanged."""
    for version in range(data["schema_version"], SCHEMA_VERSION):
        data = STEPS[version](data)
    return data


def without(data: Any, paths: Iterable[Sequence[str | int]]) -> Any:
    """`data` without the values at `paths`, each the keys and indices that lead to one."""
    found = list(paths)
    if () in found:
        raise ValueError("a path must have at least one key")
    gone = {path[0] for path in found if len(path) == 1}
    deeper: dict[str | int, list[Sequence[str | int]]] = {}
    for path in found:
        if len(path) > 1:
            deeper.setdefault(path[0], []).append(path[1:])
    entries = list(data.items()) if isinstance(data, Mapping) else list(enumerate(data))
    kept = {k: without(v, deeper[k]) if k in deeper else v for k, v in entries if k not in gone}
    return kept if isinstance(data, Mapping) else list(kept.values())


def legacy_digest(cell: Cell) -> str:
    """What `Cell.digest` was: over the whole JSON but for OPTIONAL fields with the value given there."""
    data = cell.model_dump(mode="json")
    recipe = data["recipe"]
    kept = {name: recipe[name] for name in RECIPE}
    kept |= {name: recipe[name] for name, value in OPTIONAL.items() if recipe[name] != value}
    text = json.dumps({**{name: data[name] for name in CELL}, "recipe": kept}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def former_ids(cell: Cell) -> tuple[str, ...]:
    """The ids that `cell` had under earlier rules, where they are others than today's.

    Fields that such a rule does not know are not in them, so that a record found there may be of another cell.
    """
    former = f"{cell.stem}_{legacy_digest(cell)}"
    return () if former == cell.id else (former,)


def may_name(name: str, cell: Cell) -> bool:
    """Whether `name` is, or was under some rule and some defaults, an id of `cell`: its readable part and a digest."""
    return name.startswith(cell.stem) and DIGEST.fullmatch(name, len(cell.stem)) is not None
