"""Observe gradients and the autograd graph inside a model, with hooks that are removed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def watch_gradients(parameters: Mapping[str, nn.Parameter]) -> Iterator[set[str]]:
    """Collect the names of parameters that get a nonzero gradient inside the block."""
    alive: set[str] = set()

    def watch(name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if name not in alive and parameter.grad is not None and parameter.grad.any():
                alive.add(name)

        return look

    hooks = [p.register_post_accumulate_grad_hook(watch(name)) for name, p in parameters.items()]
    try:
        yield alive
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def graph(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Collect, in order, the names of frozen modules whose forward pass autograd enters inside the block.

    Autograd enters a module if an output requires gradient or if anything is saved for backward. Modules that hold
    trainable parameters, their own or inserted ones, are not judged; the frozen modules inside them are, except those
    without parameters (a dropout, an activation) inside a module that trains as a whole.
    """
    whole = tuple(f"{name}." for name, m in modules.items() if _trains_whole(m))
    unmoved = {name: m for name, m in modules.items() if not any(p.requires_grad for p in m.parameters())}
    frozen = {name: m for name, m in unmoved.items() if not name.startswith(whole)}
    inside: list[str] = []
    reached: dict[str, None] = {}

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def leave(name: str) -> Callable[..., None]:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            inside.pop()
            if any(t.requires_grad for t in _tensors(output)):
                reached[name] = None

        return look

    def pack(tensor: Tensor) -> Tensor:
        if inside:
            reached[inside[-1]] = None
        return tensor

    hooks = [m.register_forward_pre_hook(enter(name)) for name, m in frozen.items()]
    hooks += [m.register_forward_hook(leave(name)) for name, m in frozen.items()]
    names: list[str] = []
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield names
    finally:
        names += reached
        for hook in hooks:
            hook.remove()


def _trains_whole(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(p.requires_grad for p in parameters)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in _tensors(item))
    elif isinstance(value, (list, tuple)):
        yield from (t for item in value for t in _tensors(item))
