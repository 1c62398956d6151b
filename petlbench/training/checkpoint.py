"""Save tensors, and the checkpoint from which a killed cell continues, as safetensors and JSON; nothing is pickled."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petlbench.core.files import replacing

SHARE = 50  # wait at least this many times as long as the last checkpoint took to write


@dataclass(frozen=True)
class Saved:
    """Tensors by name, and the values that are not tensors (JSON)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix/`, and strip it."""
        start = f"{prefix}/"
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `prefix/` before each name; the inverse of `Saved.under`."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a safetensors file atomically and return its size in bytes. Raises Unwritable as `replacing` does."""
    with replacing(path) as temporary:
        try:
            plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(plain, temporary, metadata=dict(metadata))
        except SafetensorError as error:  # a full disk; the reason stands last
            raise OSError(str(error).rpartition(": ")[2]) from error
    return path.stat().st_size


class Checkpoint:
    """The one checkpoint of a cell: rewritten at intervals while the cell trains, removed when it is done.

    `key` identifies cell, code, data and device: a checkpoint with another key is ignored. `seconds` is the least time
    between two checkpoints; zero writes one after every step.
    """

    def __init__(self, path: Path, key: str, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.path, self.key, self._seconds, self._now = path, key, seconds, now
        self._last = now()
        self._cost = 0.0

    def due(self) -> bool:
        """Return whether to write a checkpoint now. Slow ones are written less often, to keep their cost small."""
        share = SHARE if self._seconds else 0
        return self._now() - self._last >= max(self._seconds, share * self._cost)

    def save(self, state: Saved) -> None:
        """Replace the checkpoint. Raise Unwritable if the disk is full."""
        start = self._now()
        save_tensors(self.path, state.tensors, {"key": self.key, "rest": json.dumps(state.rest)})
        self._last = self._now()
        self._cost = self._last - start

    def load(self) -> Saved | None:
        """Return the last checkpoint, on the CPU; None if it is missing, damaged, or has another key."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                names = list(file.keys())  # the file itself cannot be iterated over
                return Saved({name: file.get_tensor(name) for name in names}, json.loads(metadata["rest"]))
        except Exception:  # whatever is wrong with the file, the cell starts anew
            return None

    def remove(self) -> None:
        """Delete the checkpoint if it exists."""
        self.path.unlink(missing_ok=True)
