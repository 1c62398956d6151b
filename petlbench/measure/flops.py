"""Floating-point operations by torch's own counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from petlbench.core.record import Flops
from petlbench.measure.canonical import canonical

aten = torch.ops.aten


def _product(x_shape: Sequence[int], y_shape: Sequence[int], **rest: Any) -> int:
    """Return the operations of a product (…, n, k) or (k,) times (…, k, m) or (k,)."""
    return 2 * prod(x_shape) * (y_shape[-1] if len(y_shape) > 1 else 1)


def _added_product(bias_shape: Sequence[int], x_shape: Sequence[int], y_shape: Sequence[int], **rest: Any) -> int:
    return _product(x_shape, y_shape)


def _convolution_backward(
    grad_shape: Sequence[int], x_shape: Sequence[int], w_shape: Sequence[int], *options: Any, **rest: Any
) -> int:
    """Each gradient, of the input and of the weight, costs what the forward convolution does."""
    _bias_sizes, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = options
    return (output_mask[0] + output_mask[1]) * 2 * prod(x_shape if transposed else grad_shape) * prod(w_shape[1:])


# Torch's counter leaves products with a vector, which `matmul` makes of one-dimensional inputs, and summed batches at
# zero, and multiplies the weight gradient of a grouped convolution by the number of groups.
CORRECTED: dict[Any, Callable[..., int]] = {
    aten.mv: _product,
    aten.dot: _product,
    aten.vdot: _product,
    aten.addmv: _added_product,
    aten.addbmm: _added_product,
    aten.convolution_backward: _convolution_backward,
}


def counter() -> FlopCounterMode:
    """A silent counter of multiply-adds, two operations each, in matrix products, convolutions and attention."""
    return FlopCounterMode(display=False, custom_mapping=CORRECTED)


def step_flops(loss: Callable[[], Tensor]) -> Flops:
    """Operations of `loss()`, a scalar, and of its `backward()`; a multiplication and an addition are two.

    Attention is unfused, so that the count is the same on every device. Element-wise work, reductions and look-ups are
    left out. Put the modules in evaluation mode first. Gradients accumulate, as after any backward pass.
    """
    with canonical(), sdpa_kernel(SDPBackend.MATH), counter() as counted:
        value = loss()
        forward = counted.get_total_flops()
        value.backward()
    return Flops(forward=forward, backward=counted.get_total_flops() - forward)
