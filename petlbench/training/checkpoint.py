"""Tensors on disk, and the checkpoint from which a killed cell goes on: safetensors and JSON, nothing to unpickle."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petlbench.core.errors import Unwritable

SHARE = 50  # a checkpoint is written no sooner than after this many times the seconds that the last one took


@dataclass(frozen=True)
class Saved:
    """Tensors by name, and what is no tensor (JSON values)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix/`, without it."""
        start = f"{prefix}/"
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `State.under`."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a safetensors file atomically; its size in bytes. Raises Unwritable when it cannot be written."""
    partial = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata=dict(metadata))
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:  # which of the two a full disk raises depends on the step
        what = (isinstance(error, OSError) and error.strerror) or str(error).rpartition(": ")[2]
        raise Unwritable(f"cannot write {path}: {what}; free some space there or choose another folder") from error
    return path.stat().st_size


class Checkpoint:
    """The one checkpoint of a cell, rewritten now and then while it trains and removed when it is done.

    `key` says what it belongs to (cell, code, data, device): one with another key is never continued from. `seconds`
    is the least time between two; zero writes one after every step.
    """

    def __init__(self, path: Path, key: str, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.path, self.key, self._seconds, self._now = path, key, seconds, now
        self._last = now()
        self._cost = 0.0

    def due(self) -> bool:
        """Whether the next one should be written now; large ones are written less often, so that they cost little."""
        share = SHARE if self._seconds else 0
        return self._now() - self._last >= max(self._seconds, share * self._cost)

    def save(self, state: Saved) -> None:
        """Replace the checkpoint. Raises Unwritable when the disk is full."""
        start = self._now()
        save_tensors(self.path, state.tensors, {"key": self.key, "rest": json.dumps(state.rest)})
        self._last = self._now()
        self._cost = self._last - start

    def load(self) -> Saved | None:
        """What was saved last, on the CPU; None when there is none, or one that is damaged or of something else."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                names = list(file.keys())  # no mapping: it cannot be iterated over
                return Saved({name: file.get_tensor(name) for name in names}, json.loads(metadata["rest"]))
        except Exception:  # whatever is wrong with it: the cell then starts anew
            return None

    def remove(self) -> None:
        """Delete it, if it is there."""
        self.path.unlink(missing_ok=True)
