"""List and compare what a module tree holds: tensors, plain values, hooks and attributes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TREE = ("_parameters", "_buffers", "_modules")
SHOWN = 3  # names in a message


def first_few(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of the tree by name: parameters, buffers, and plain attributes."""
    by_name: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in _attributes(module):
        if isinstance(value, Tensor):
            by_name.setdefault(name, value)
    return by_name


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a hash of each tensor's bits."""
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def values(module: nn.Module, owner: object = None) -> dict[str, str]:
    """Return digests of all tensors, and all numbers among the attributes, of the tree and of `owner` (a method)."""
    own = {f"method.{name}": value for name, value in vars(owner).items()} if owner is not None else {}
    plain = {name: value for name, value in [*_attributes(module), *own.items()] if isinstance(value, (int, float))}
    loose = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    return {**digests(tensors(module) | loose), **{name: repr(value) for name, value in plain.items()}}


def differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return the names whose values differ, or that only one mapping has."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _digest(tensor: Tensor) -> str:
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bits.numpy().tobytes()).hexdigest()[:16]


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of all attributes beside the tree, and of each item in plain containers."""
    for prefix, child in module.named_modules():
        for name, value in vars(child).items():
            if name in TREE or name == "training" or name.endswith("_hooks"):
                continue
            path = f"{prefix}.{name}".lstrip(".")
            yield path, value
            if isinstance(value, (list, tuple)):
                yield from ((f"{path}.{i}", item) for i, item in enumerate(value))
            elif isinstance(value, dict):
                yield from ((f"{path}.{key}", item) for key, item in value.items())


class ModuleSnapshot:
    """The structure of a module tree, without values: its modules, their classes, attributes and hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._root = module
        self._seen = self._list()

    def changes(self) -> list[str]:
        """Return the names of what has changed since, such as `attribute forward of encoder`."""
        now = self._list()
        return [name for name in {**self._seen, **now} if not _same(self._seen.get(name), now.get(name))]

    def _list(self) -> dict[str, Any]:
        contents: dict[str, Any] = {}
        for prefix, module in self._root.named_modules():
            name = prefix or "the backbone"
            contents[f"class of {name}"] = type(module)
            for key, value in vars(module).items():
                what = f"{key.strip('_').replace('_', ' ')} of" if key.endswith("_hooks") else f"attribute {key} of"
                contents[f"{what} {name}"] = _copied(value)
        for name, parameter in self._root.named_parameters():
            for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                contents[f"{key.strip('_').replace('_', ' ')} of {name}"] = _copied(getattr(parameter, key, None) or {})
        for key, value in vars(torch.nn.modules.module).items():
            if key.startswith("_global_") and key.endswith("_hooks"):
                contents[f"torch's {key.strip('_').replace('_', ' ')}"] = _copied(value)
        return contents


def _copied(value: Any) -> Any:
    """Copy a container, because it may change in place."""
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, (list, set)) else value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, (Tensor, nn.Module)):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
