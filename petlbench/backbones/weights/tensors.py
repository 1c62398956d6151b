"""Weights into modules: every reason why that can fail, in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from petlbench.core.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"
SHOWN = 3  # names in a message


def on_meta() -> bool:
    """True where modules are built without memory: there is nothing to load values into."""
    return torch.get_default_device().type == "meta"


def asset(name: str) -> Path:
    """A file by its name in the package's assets, or by its path. Raises UserError when it does not exist."""
    path = ASSETS / name if (ASSETS / name).exists() else Path(name)
    if not path.is_file():
        raise UserError(f"backbone file '{name}' does not exist: give a path, or a name in the package's assets")
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file, which is read without running what it may contain."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(f"weights {path.name} cannot be read ({said}): fetch or make the file again") from error
    for key in ("model", "state_dict"):  # where training scripts keep the model among other things
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"weights {path.name} are no mapping of names to tensors: give a state dict")
    return found


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str, *, optional: Iterable[str] = ()
) -> list[str]:
    """Put `tensors` into `module` by name; the names of `optional` prefixes that were not there.

    Raises UserError, and changes nothing, when names are missing (but for `optional` prefixes) or unexpected, or
    shapes differ: the first few are named, all are counted.
    """
    own = module.state_dict()
    absent = [name for name in own if name not in tensors]
    allowed = tuple(optional)
    missing = [name for name in absent if not (allowed and name.startswith(allowed))]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} is {_shape(tensors[name])}, not {_shape(own[name])}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    said = [f"{len(names)} {kind} ({first_few(names)})" for kind, names in wrong.items() if names]
    if said:
        raise UserError(f"weights {source} do not fit this configuration: {'; '.join(said)}")
    if not on_meta():
        module.load_state_dict(dict(tensors), strict=False)
    return absent


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"


def first_few(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
