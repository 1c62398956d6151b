"""Find the modules that a method inserted, and restore the untouched backbone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from petlbench.api.sites import Layer, Parallel, Stack, SubLayer
from petlbench.core.former_names import warn_of


def inserted(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that methods inserted: at sites, beside projections, behind layers, and those with a true
    attribute `is_side_module` (such as a side network)."""
    for child in module.modules():
        if isinstance(child, SubLayer):
            yield from (one for place in child.sites.children() for one in place.children())
        elif isinstance(child, Parallel):
            yield child.path
        elif isinstance(child, Layer):
            yield from child.tail
        elif getattr(child, "is_side_module", False):
            yield child
        elif getattr(child, "brought", False):
            warn_of(f"{type(child).__name__}.brought", "is_side_module")
            yield child


class Snapshot:
    """Restores a module tree, bit for bit: its structure, values, gradients' flags and modes, and how layers run."""

    def __init__(self, module: nn.Module) -> None:
        self._children = [(m, dict(m._modules), m.training) for m in module.modules()]
        self._flags = [(p, p.requires_grad) for p in module.parameters()]
        self._running = [(m, m.checkpointing) for m in module.modules() if isinstance(m, Stack)]
        self._compiled = [(m, m._compiled_call_impl) for m in module.modules() if isinstance(m, Layer)]
        values = [*module.parameters(), *module.buffers()]
        # On the CPU: a second copy of all weights on the GPU would count as memory of training.
        self._values = [(t, t.detach().to("cpu", copy=True)) for t in values if not t.is_meta]

    @torch.no_grad()
    def restore(self) -> None:
        for module, children, training in self._children:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        for stack, checkpointing in self._running:
            stack.checkpointing = checkpointing
        for layer, compiled in self._compiled:
            layer._compiled_call_impl = compiled
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for tensor, value in self._values:
            tensor.copy_(value)
