"""Floating-point operations by torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def unfused_attention() -> AbstractContextManager[None]:
    """Attention as plain matrix products: the same operations, and the same saved tensors, on every device."""
    return sdpa_kernel(SDPBackend.MATH)


def step_flops(fn: Callable[[], object]) -> int:
    """Operations of `fn`, which runs one forward and backward pass; a multiplication and an addition are two.

    Counts matrix products, convolutions and attention, as `FlopCounterMode` does; element-wise work is left out.
    """
    counter = FlopCounterMode(display=False)
    with unfused_attention(), counter:
        fn()
    return counter.get_total_flops()
