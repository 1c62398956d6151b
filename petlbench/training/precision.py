"""Set up how a cell computes, as its recipe says: precision, attention kernels, recomputation and compilation.

The default is plain torch in float32. Weights, gradients and the optimizer's moments always stay in float32.
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
VARIANTS = 64  # of one function, by layer, mode and length; past torch's limit of 8 it would run uncompiled


@contextmanager
def kernels(recipe: Recipe) -> Iterator[None]:
    """Select the recipe's attention kernels. Needed around backward too, where checkpointed layers run again."""
    with ExitStack() as stack:
        if recipe.attention == "unfused":
            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        if recipe.compile:
            import torch._dynamo.config  # importing it takes a second

            stack.enter_context(torch._dynamo.config.patch(recompile_limit=VARIANTS))
        yield


@contextmanager
def computing(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Apply `kernels` and autocast, for forward passes with or without gradients."""
    with kernels(recipe), ExitStack() as stack:
        if recipe.precision in LOWERED:
            stack.enter_context(torch.autocast(device.type, LOWERED[recipe.precision]))
        yield


def scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler: it keeps small fp16 gradients from vanishing, and skips steps whose gradients overflow.

    It has no effect in the other precisions, whose exponents reach far enough.
    """
    return torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")


def prepare(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """Switch recomputation of layers in backward, and compilation of layers, on or off in `model`.

    Structure, names and values stay. On the meta device nothing is compiled. Raise UserError if torch cannot compile.
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
    """Compile a small function; return the error in one line, or an empty string if it works."""
    try:
        torch.compile(torch.square, backend=compiler)(torch.ones(2, device=device))
    except Exception as error:  # many types: no compiler, no triton, no such backend
        return one_line(error)
    return ""


def backend_text(recipe: Recipe, device: torch.device, backbone: Backbone) -> str:
    """Return what the natively saved bytes depend on: `cpu, fused attention, fp32`, and further recipe options."""
    attention = recipe.attention if backbone.fused_attention else "unfused"
    options = {"gradient checkpointing": recipe.gradient_checkpointing, "compiled": recipe.compile}
    parts = [device.type, f"{attention} attention", recipe.precision, *(name for name, on in options.items() if on)]
    return ", ".join(parts)
