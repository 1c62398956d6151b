"""Load weights into modules; every failure gives an error of one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from petlbench.core.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"
SHOWN = 3  # how many names a message shows


def on_meta() -> bool:
    """Return whether modules are built on the meta device, without memory, so that no values can be loaded."""
    return torch.get_default_device().type == "meta"


def asset(name: str) -> Path:
    """Return a file by its name in the package's assets, or by its path. Raise UserError if it does not exist."""
    path = ASSETS / name if (ASSETS / name).exists() else Path(name)
    if not path.is_file():
        raise UserError(f"backbone file '{name}' does not exist: give a path, or a name in the package's assets")
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or torch file; a torch file is read without running code in it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        message = " ".join(str(error).split())[:120]
        raise UserError(f"weights {path.name} cannot be read ({message}): fetch or make the file again") from error
    for key in ("model", "state_dict"):  # where training scripts store the model beside other values
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"weights {path.name} are not a mapping of names to tensors: give a state dict")
    return content


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str, *, optional: Iterable[str] = ()
) -> list[str]:
    """Load `tensors` into `module` by name; return the names in `module` that `tensors` lacks.

    Raise UserError, and change nothing, if names are missing (except those with `optional` prefixes) or unexpected, or
    if shapes differ; the message names the first few and counts all.
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
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    counts = [f"{len(names)} {problem} ({first_few(names)})" for problem, names in problems.items() if names]
    if counts:
        raise UserError(f"weights {source} do not fit this configuration: {'; '.join(counts)}")
    if not on_meta():
        module.load_state_dict(dict(tensors), strict=False)
    return absent


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"


def first_few(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
