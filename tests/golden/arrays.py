"""Golden files of arrays: results of the authors' own code, and the distance of ours from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-9  # for float64
SINGLE = 1e-4  # for values that the original computed in single precision

# By file name, the function that yields a file's differences.
CHECKS: dict[str, str] = {
    "tiny_bart_*": "vl_pet_models:check_model",
    "tiny_t5_*": "vl_pet_models:check_model",
    "train6_*": "vl_pet_models:check_training",
    "visual_embedding_*": "vl_pet_models:check_visual_block",
    "vlpet_*": "vl_pet_layers:check",
    "vladapter_*": "pet_modules:check",
    "lora_*": "pet_modules:check",
    "compacter_*": "pet_modules:check",
    "hyperformer_*": "pet_modules:check",
    "prompt_*": "pet_modules:check",
    "adapters": "m2ist:check",
    "vision_layer": "m2ist:check",
    "text_layer": "m2ist:check",
    "tiny_model*": "m2ist:check",
    "rec_utils": "m2ist:check",
    "g[0-9]*": "multiway:check",
    "lst_*": "ladder:check",
    "adaptformer_*": "bottleneck:check",
    "bottleneck_*": "bottleneck:check",
}


class Arrays(dict[str, Tensor]):
    """A file's arrays by name, and its hyper-parameters."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.folder, self.name = path.parent, path.stem
        self.meta: dict[str, Any] = {}
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                if key in ("meta_json", "hparams_json"):
                    self.meta = json.loads(str(file[key]))
                elif file[key].dtype.kind in "biuf":
                    self[key] = torch.from_numpy(np.array(file[key]))

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays whose name starts with `prefix`, by the rest of the name."""
        return {key.removeprefix(prefix): value for key, value in self.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class Difference:
    """The largest |ours - theirs| / max(1, largest |theirs|) of one array; infinite if the shapes differ."""

    name: str
    gap: float
    tolerance: float = TOLERANCE

    @property
    def agrees(self) -> bool:
        return self.gap <= self.tolerance  # false for NaN too


Check = Callable[[Arrays], Iterator[Difference]]


def difference(name: str, ours: Any, theirs: Tensor, tolerance: float = TOLERANCE) -> Difference:
    """Compare an output, a gradient or integers (these exactly, whatever the tolerance); None means ours is missing."""
    if ours is None:
        return Difference(name, float("inf"), tolerance)
    ours = torch.as_tensor(ours).detach()
    if ours.shape != theirs.shape:
        return Difference(name, float("inf"), tolerance)
    if not theirs.is_floating_point():
        return Difference(name, float(not torch.equal(ours.to(theirs.dtype), theirs)), 0.0)
    if not theirs.numel():
        return Difference(name, 0.0, tolerance)
    gap = (ours.double() - theirs.double()).abs().max() / theirs.abs().max().clamp_min(1)
    return Difference(name, float(gap), tolerance)


def check_of(path: Path) -> Check:
    """Return the check of a file. Raises ValueError if no check has its name."""
    target = next((target for pattern, target in CHECKS.items() if fnmatchcase(path.stem, pattern)), None)
    if target is None:
        raise ValueError(f"no check is for a file of this name: there are some for {', '.join(CHECKS)}")
    module, _, function = target.partition(":")
    check: Check = getattr(import_module(f"tests.golden.checks.{module}"), function)
    return check


def differences(path: Path) -> list[Difference]:
    """Return the differences of everything that the file's check compares."""
    return list(check_of(path)(Arrays(path)))


def report(path: Path, say: Callable[[str], None] = print) -> bool:
    """Print the difference of each output and gradient; true if none is too large."""
    found = differences(path)
    wrong = sum(not item.agrees for item in found)
    worst = max((item.gap for item in found), default=float("nan"))
    say(f"{path}: {len(found)} arrays, {wrong} differ by more than allowed, largest difference {worst:.3g}")
    for item in found:
        mark = "" if item.agrees else f"  DIFFERS (allowed {item.tolerance:g})"
        say(f"  {item.gap:<9.3g} {item.name}{mark}")
    return bool(found) and not wrong
