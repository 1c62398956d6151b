"""What a module tree holds, and what is left behind in one: tensors, plain values, hooks, attributes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TREE = ("_parameters", "_buffers", "_modules")
SHOWN = 3  # names in a message


def first_few(names: Iterable[str]) -> str:
    """The first few of the names, and how many there are beyond them."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the tree by name: parameters, buffers, and those that merely are attributes."""
    found: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in _attributes(module):
        if isinstance(value, Tensor):
            found.setdefault(name, value)
    return found


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash of each tensor's bits."""
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def values(module: nn.Module, owner: object = None) -> dict[str, str]:
    """Digests of all tensors, and the numbers among the attributes, of the tree and of `owner` (a method)."""
    own = {f"method.{name}": value for name, value in vars(owner).items()} if owner is not None else {}
    plain = {name: value for name, value in [*_attributes(module), *own.items()] if isinstance(value, (int, float))}
    loose = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    return {**digests(tensors(module) | loose), **{name: repr(value) for name, value in plain.items()}}


def differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names with another value, or in only one of the two."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _digest(tensor: Tensor) -> str:
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bits.numpy().tobytes()).hexdigest()[:16]


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything that a module has beside its tree; what plain containers hold one by one."""
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
    """The furniture of a module tree, apart from values: its modules, their classes, attributes and hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._root = module
        self._seen = self._look()

    def changes(self) -> list[str]:
        """What differs now, as `module: attribute` in words."""
        now = self._look()
        return [name for name in {**self._seen, **now} if not _same(self._seen.get(name), now.get(name))]

    def _look(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for prefix, module in self._root.named_modules():
            name = prefix or "the backbone"
            found[f"class of {name}"] = type(module)
            for key, value in vars(module).items():
                what = f"{key.strip('_').replace('_', ' ')} of" if key.endswith("_hooks") else f"attribute {key} of"
                found[f"{what} {name}"] = _copied(value)
        for name, parameter in self._root.named_parameters():
            for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                found[f"{key.strip('_').replace('_', ' ')} of {name}"] = _copied(getattr(parameter, key, None) or {})
        for key, value in vars(torch.nn.modules.module).items():
            if key.startswith("_global_") and key.endswith("_hooks"):
                found[f"torch's {key.strip('_').replace('_', ' ')}"] = _copied(value)
        return found


def _copied(value: Any) -> Any:
    """A container may change in place, so its present content is kept."""
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
