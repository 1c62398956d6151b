"""How a cell computes: its precision, its attention kernels, recomputation and compilation, as its recipe says.

By default all is plain torch in float32. Weights, gradients and the optimizer's moments stay in float32 in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from petlbench.api.backbone import Backbone
from petlbench.api.sites import Layer, Stack
from petlbench.core.errors import UserError
from petlbench.core.messages import one_line
from petlbench.core.recipe import Recipe

LOWERED = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMPILER = "inductor"  # torch's own default
VARIANTS = 64  # of one function, for each kind of layer, mode and length: beyond torch's 8 it would run uncompiled


@contextmanager
def kernels(recipe: Recipe) -> Iterator[None]:
    """Attention as the recipe says. Also around a backward pass, where checkpointed layers run again."""
    with ExitStack() as stack:
        if recipe.attention == "unfused":
            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        if recipe.compile:
            import torch._dynamo.config  # a second of importing

            stack.enter_context(torch._dynamo.config.patch(recompile_limit=VARIANTS))
        yield


@contextmanager
def computing(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """`kernels`, and autocast: for forward passes, also those without gradients."""
    with kernels(recipe), ExitStack() as stack:
        if recipe.precision in LOWERED:
            stack.enter_context(torch.autocast(device.type, LOWERED[recipe.precision]))
        yield


def scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler:
    """What keeps small gradients of fp16 from vanishing, and skips steps in which large ones overflow.

    Without effect in the other precisions, whose exponents reach far enough.
    """
    return torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")


def prepare(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """Let the stacks in `model` recompute their layers in backward, and the layers run compiled, or neither.

    Structure, names and values stay. On the meta device nothing is compiled. Raises UserError where torch cannot
    compile.
    """
    compiled = recipe.compile and device.type != "meta"
    if compiled and (fault := _fault_of_compiler(COMPILER, device.type)):
        raise UserError(
            f"recipe: compile: torch.compile does not work here ({fault:.200}): install a C++ compiler (on a GPU also "
            "triton), or leave `compile` out"
        )
    for module in model.modules():
        if isinstance(module, Stack):
            module.checkpointing = recipe.gradient_checkpointing
        elif isinstance(module, Layer):
            vars(module).pop("_compiled_call_impl", None)
            if compiled:
                module.compile(backend=COMPILER)


@cache
def _fault_of_compiler(compiler: str, device: str) -> str:
    """What goes wrong when the smallest function is compiled, in one line; nothing where all is well."""
    try:
        torch.compile(torch.square, backend=compiler)(torch.ones(2, device=device))
    except Exception as error:  # of many kinds: no compiler, no triton, no such backend
        return one_line(error)
    return ""


def described(recipe: Recipe, device: torch.device, backbone: Backbone) -> str:
    """What natively saved bytes depend on: `cpu, fused attention, fp32`, and what else the recipe asks for."""
    attention = recipe.attention if backbone.fused_attention else "unfused"
    options = {"gradient checkpointing": recipe.gradient_checkpointing, "compiled": recipe.compile}
    parts = [device.type, f"{attention} attention", recipe.precision, *(name for name, on in options.items() if on)]
    return ", ".join(parts)
