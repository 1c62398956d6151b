"""Upgrade older records to today's schema step by step, and find them under their earlier names. Imports no torch.

A step takes the JSON object of a record of one version and returns it as the next version would have written it. It
moves or drops keys whose meaning has changed, may keep keys that have no counterpart (the reader of an older record
drops them), and leaves out what was not measured then, which gets its default. `schema_version` keeps its value, which
marks an older record.
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

# The earlier rule for digests (`legacy_digest`): these fields of a cell and of its recipe always counted, ...
# fmt: off
CELL = ("method", "variant", "method_config", "task", "dataset", "dataset_config", "backbone", "backbone_config",
        "seed")
RECIPE = ("steps", "batch_size", "eval_batch_size", "lr", "weight_decay", "betas", "eps", "warmup", "schedule",
          "clip_norm", "validations", "train_limit", "eval_limit", "beams", "lr_factors")
# fmt: on
# ... and these counted unless they had the value on the right.
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
    """Upgrade version 1, whose `saved_bytes` were those of its machine, now `native_saved_bytes`.

    The canonical bytes and the sum with them were not measured. `step_flops` (not split into forward and backward)
    and `timing.latency_seconds` (without a throughput) have no counterpart now.
    """
    memory = data.get("memory")
    if not isinstance(memory, dict):
        return data
    moved = {"native_saved_bytes": memory.get("saved_bytes"), "saved_bytes": None, "accounted_bytes": None}
    return {**data, "memory": {**memory, **moved}}


STEPS: dict[int, Callable[[Json], Json]] = {1: from_1}  # by the version that the step starts from


def upgraded(data: Json) -> Json:
    """Upgrade `data`, a record of a version in STEPS, to today's form; its `schema_version` stays unchanged."""
    for version in range(data["schema_version"], SCHEMA_VERSION):
        data = STEPS[version](data)
    return data


def without(data: Any, paths: Iterable[Sequence[str | int]]) -> Any:
    """Return `data` without the values at `paths`; a path is the keys and indices that lead to a value."""
    listed = list(paths)
    if () in listed:
        raise ValueError("a path must have at least one key")
    removed = {path[0] for path in listed if len(path) == 1}
    deeper: dict[str | int, list[Sequence[str | int]]] = {}
    for path in listed:
        if len(path) > 1:
            deeper.setdefault(path[0], []).append(path[1:])
    entries = list(data.items()) if isinstance(data, Mapping) else list(enumerate(data))
    kept = {k: without(v, deeper[k]) if k in deeper else v for k, v in entries if k not in removed}
    return kept if isinstance(data, Mapping) else list(kept.values())


def legacy_digest(cell: Cell) -> str:
    """Return the digest by the earlier rule: of all fields but the OPTIONAL ones with the value given there."""
    data = cell.model_dump(mode="json")
    recipe = data["recipe"]
    kept = {name: recipe[name] for name in RECIPE}
    kept |= {name: recipe[name] for name, value in OPTIONAL.items() if recipe[name] != value}
    text = json.dumps({**{name: data[name] for name in CELL}, "recipe": kept}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def former_ids(cell: Cell) -> tuple[str, ...]:
    """Return the ids that `cell` had under earlier rules and that differ from today's.

    An earlier rule ignores later fields, so that a record under such an id may belong to another cell.
    """
    former = f"{cell.stem}_{legacy_digest(cell)}"
    return () if former == cell.id else (former,)


def may_name(name: str, cell: Cell) -> bool:
    """Return whether `name` is, or was under an earlier rule or default, an id of `cell`: its stem and a digest."""
    return name.startswith(cell.stem) and DIGEST.fullmatch(name, len(cell.stem)) is not None
