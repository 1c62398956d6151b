"""Methods with one fault each, and sound ones beside them. A new process imports them, so they are in a module."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from petlbench.methods.lora import LoRA
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method
from petlbench.api.sites import SubLayer


class Gain(nn.Module):
    """u = h * (1 + s); zero gains leave h unchanged."""

    def __init__(self, sublayer: SubLayer, start: float = 0.0) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.full((sublayer.width,), start))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h * (1 + self.s)


class Gains(Method):
    """Sound: put a gain after every sub-layer of the encoder."""

    identity = True
    module: ClassVar[type[nn.Module]] = Gain

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        for layer in backbone.stack("encoder"):
            for _, sublayer in layer.items():
                sublayer.insert("output", self.module(sublayer))
        return backbone


class WritingGain(Gain):
    def __init__(self, sublayer: SubLayer) -> None:
        super().__init__(sublayer)
        self.host = (sublayer.norm.get_parameter("weight"),)  # in a tuple, so that it is not this module's parameter

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if self.training:
            self.host[0].data.mul_(0.999)
        return super().forward(x, h)


class WritesFrozenWeights(Gains):
    module = WritingGain


class BufferGain(Gain):
    running_mean: Tensor

    def __init__(self, sublayer: SubLayer) -> None:
        super().__init__(sublayer)
        self.register_buffer("running_mean", torch.zeros(sublayer.width))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.running_mean += 0.1 * h.mean((0, 1))
        return super().forward(x, h) - self.running_mean


class ForgetsBuffer(Gains):
    module = BufferGain


class CountingGain(Gain):
    def __init__(self, sublayer: SubLayer) -> None:
        super().__init__(sublayer)
        self.passes = 0

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        self.passes += int(self.training)
        return super().forward(x, h) * (1 + 0.01 * self.passes)


class ForgetsNumber(Gains):
    module = CountingGain


class UselessGain(Gain):
    def __init__(self, sublayer: SubLayer) -> None:
        super().__init__(sublayer)
        self.useless = nn.Parameter(torch.ones(3))


class DeadParameter(Gains):
    module = UselessGain


class DeclaredDeadParameter(Gains):
    """Sound: declare which parameter gets no gradient, and why."""

    module = UselessGain
    unused_parameters: ClassVar[dict[str, str]] = {"*.useless": "shows how to declare it"}


class FalselyConditional(Gains):
    """Declare that a parameter gets a gradient on some tasks, although it never does."""

    module = UselessGain
    conditional: ClassVar[dict[str, str]] = {"*.useless": "only some tasks use it"}


class StaleDeclarations(Gains):
    unused_parameters: ClassVar[dict[str, str]] = {
        "*.long_gone": "it was removed",
        "*.attention.sites.output.0.s": "it is alive",
    }


class LargeGain(Gain):
    def __init__(self, sublayer: SubLayer) -> None:
        super().__init__(sublayer, start=0.1)


class NoIdentity(Gains):
    module = LargeGain


class WrongMerge(LoRA):
    def merge(self) -> None:
        for projection, path in self._paths:
            projection.fold(0.999 * path.delta().detach())
            projection.remove(path)


class NoMerge(Gains):
    mergeable = True


class RandomGain(Gain):
    def __init__(self, sublayer: SubLayer) -> None:
        super().__init__(sublayer, start=float(np.random.default_rng().normal(scale=1e-2)))


class Unseeded(Gains):
    identity = False
    module = RandomGain


class Tail(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, y: Tensor) -> Tensor:
        return y + F.gelu(self.linear(y))


class DetachedTail(Method):
    """Sound: put everything that trains after the frozen encoder."""

    no_backbone_gradient = True

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.requires_grad_(False)
        *_, last = backbone.stack("encoder")
        last.tail.append(Tail(backbone.width))
        return backbone


class FalselyDetached(DetachedTail):
    """Train the host's visual projection, so that the gradient passes through the whole tower."""

    def adapt(self, backbone: Backbone) -> Backbone:
        super().adapt(backbone)
        for name in backbone.host_parameters():
            backbone.get_parameter(name).requires_grad_(True)
        return backbone


class NaNGain(Gain):
    def __init__(self, sublayer: SubLayer) -> None:
        super().__init__(sublayer, start=float("nan"))


class StartsAtNaN(Gains):
    module = NaNGain


class DroppingGain(Gain):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return F.dropout(super().forward(x, h), 0.1, training=True)


class DropsInEvaluation(Gains):
    module = DroppingGain


class WakingGain(Gain):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        self.train()
        return super().forward(x, h)


class TrainsInEvaluation(Gains):
    module = WakingGain


class AdaptingGain(BufferGain):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.running_mean += 0.1 * h.mean((0, 1)) * (not self.training)
        return Gain.forward(self, x, h)


class UpdatesInEvaluation(Gains):
    module = AdaptingGain


class SwitchesModes(Gains):
    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.stack("vision").eval()
        return super().adapt(backbone)


class BatchGain(Gain):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return super().forward(x, h) - h.mean((0, 1))


class MixesRows(Gains):
    identity = False
    module = BatchGain


class LeavesHook(Gains):
    def adapt(self, backbone: Backbone) -> Backbone:
        first, *_ = backbone.stack("encoder")
        first.register_forward_hook(_nothing)
        return super().adapt(backbone)


class LeavesAttribute(Gains):
    """Wrap a frozen module's own `forward`."""

    def adapt(self, backbone: Backbone) -> Backbone:
        first, *_ = backbone.stack("encoder")
        first["ffn"].norm.forward = _Doubled(first["ffn"].norm.forward)
        return super().adapt(backbone)


class _Doubled:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x) - self.inner(x)


class SharingGain(Gain):
    def __init__(self, sublayer: SubLayer) -> None:
        super().__init__(sublayer)
        self.bias = nn.Parameter(sublayer.norm.get_parameter("bias").data)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return super().forward(x, h) + self.bias - self.bias.detach()


class SharesMemory(Gains):
    module = SharingGain


class Refuses(Gains):
    def adapt(self, backbone: Backbone) -> Backbone:
        raise ZeroDivisionError("no room for another adapter")


def _nothing(*_: Any) -> None:
    """Do nothing; the fault is that the hook stays."""
