"""BART layers with a method written directly into them, as in a repository of the method alone.

Each class takes an adapted layer apart and computes the same from its modules, without sites, passes or paths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.sites import Layer, SubLayer

TEXT_TOKENS = 20  # they come first in the encoder's input


def inserted(sublayer: SubLayer, place: str) -> Any:
    """Return the one module at a place."""
    (module,) = sublayer.sites[place].children()
    return module


class InlineLayer(nn.Module):
    """A post-norm layer of an encoder or, with `cross`, of a decoder; methods override `after_*` and `at_end`."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        attention, ffn = layer["attention"], layer["ffn"]
        self.attention, self.attention_norm = attention.core.attention, attention.norm
        self.fc1, self.fc2, self.ffn_norm = ffn.core.fc1, ffn.core.fc2, ffn.norm
        self.p = float(ffn.drop.p)
        self.crosses = "cross_attention" in layer.sublayers
        if self.crosses:
            cross = layer["cross_attention"]
            self.cross, self.cross_norm = cross.core.attention, cross.norm

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def forward(self, x: Tensor, bias: Tensor | None, memory: Tensor | None, memory_bias: Tensor | None) -> Tensor:
        h = self.after_attention(x, self.attention(x, attention_mask=bias)[0])
        x = self.attention_norm(x + self.drop(h))
        if self.crosses:
            h = self.cross(x, key_value_states=memory, attention_mask=memory_bias)[0]
            x = self.cross_norm(x + self.drop(self.after_cross(h)))
        h = self.after_ffn(x, self.fc2(self.drop(F.gelu(self.fc1(x)))))
        return self.at_end(self.ffn_norm(x + self.before_addition(x, self.drop(h))))

    def after_attention(self, x: Tensor, h: Tensor) -> Tensor:
        return h

    def after_cross(self, h: Tensor) -> Tensor:
        return h

    def after_ffn(self, x: Tensor, h: Tensor) -> Tensor:
        return h

    def before_addition(self, x: Tensor, h: Tensor) -> Tensor:
        return h

    def at_end(self, y: Tensor) -> Tensor:
        return y


def through(bottleneck: Any, z: Tensor) -> Tensor:
    """Compute a bottleneck from its two linear modules."""
    found: Tensor = bottleneck.up(F.gelu(bottleneck.down(z), approximate="tanh"))
    return found


class VLAdapterLayer(InlineLayer):
    """h + bn(h) after every sub-layer."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.first, self.last = inserted(layer["attention"], "output"), inserted(layer["ffn"], "output")
        if self.crosses:
            self.middle = inserted(layer["cross_attention"], "output")

    def after_attention(self, x: Tensor, h: Tensor) -> Tensor:
        return h + through(bottleneck_of(self.first), h)

    def after_cross(self, h: Tensor) -> Tensor:
        return h + through(bottleneck_of(self.middle), h)

    def after_ffn(self, x: Tensor, h: Tensor) -> Tensor:
        return h + through(bottleneck_of(self.last), h)


class LoRALinear(nn.Module):
    """x W^T + b + (alpha / r) (drop(x) A^T) B^T in one module."""

    def __init__(self, base: nn.Linear, path: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.A, self.B = base.weight, base.bias, path.A, path.B
        self.scale, self.p = path.scale, path.drop.p

    def forward(self, x: Tensor) -> Tensor:
        low = self.scale * (F.dropout(x, self.p, self.training) @ self.A.T)
        return F.linear(x, self.weight, self.bias) + low @ self.B.T


class LoRALayer(InlineLayer):
    """LoRA on q and v of every attention."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        for attention in (self.attention, *([self.cross] if self.crosses else [])):
            for name in ("q_proj", "v_proj"):
                beside = getattr(attention, name)
                setattr(attention, name, LoRALinear(beside.base, beside.path))


class ValueLinear(nn.Module):
    """W_v m + b_v + bn(m) in one module."""

    def __init__(self, base: nn.Linear, bottleneck: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.bottleneck = base.weight, base.bias, bottleneck

    def forward(self, m: Tensor) -> Tensor:
        return F.linear(m, self.weight, self.bias) + through(self.bottleneck, m)


class VLPETLayer(InlineLayer):
    """The large gate times h + bn(h) in the encoder, value adapters in the decoder."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        if self.crosses:
            beside: Any = self.cross.v_proj
            self.cross.v_proj = ValueLinear(beside.base, beside.path)
        else:
            self.first, self.last = inserted(layer["attention"], "output"), inserted(layer["ffn"], "output")

    def after_attention(self, x: Tensor, h: Tensor) -> Tensor:
        return h if self.crosses else self.controlled(self.first, x, h)

    def after_ffn(self, x: Tensor, h: Tensor) -> Tensor:
        return h if self.crosses else self.controlled(self.last, x, h)

    def controlled(self, module: Any, x: Tensor, h: Tensor) -> Tensor:
        return torch.sigmoid(through(module.gate.bottleneck, x)) * (h + through(module.change, h))


class MultiWayLayer(InlineLayer):
    """Extractors by token type beside the feed-forward network, and the released enhancer after encoder layers."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        extractor = inserted(layer["ffn"], "branch").extractor
        self.text, self.image = (extractor, None) if self.crosses else (extractor.text, extractor.image)
        if not self.crosses:
            (tail,) = layer.tail
            self.enhancer = tail.enhancer

    def before_addition(self, x: Tensor, h: Tensor) -> Tensor:
        if self.image is None:
            return h + self.extracted(self.text, x)
        text, image = x[:, :TEXT_TOKENS], x[:, TEXT_TOKENS:]
        return h + torch.cat([self.extracted(self.text, text), self.extracted(self.image, image)], dim=1)

    def extracted(self, module: Any, x: Tensor) -> Tensor:
        hidden = F.dropout(F.relu(module.bottleneck.down(x)), 0.1, self.training)
        found: Tensor = module.scale * module.bottleneck.up(hidden)
        return found

    def at_end(self, y: Tensor) -> Tensor:
        if self.crosses:
            return y
        e = self.enhancer
        return y + e.fc2(e.norm(F.gelu(e.fc1(y))))


class TappedLayer(InlineLayer):
    """A frozen encoder layer that also returns the outputs of its attention and its feed-forward network."""

    def forward(self, x: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        attended = self.attention(x, attention_mask=bias)[0]
        x = self.attention_norm(x + self.drop(attended))
        computed = self.fc2(self.drop(F.gelu(self.fc1(x))))
        return self.ffn_norm(x + self.drop(computed)), attended, computed


class SideEncoder(nn.Module):
    """M2IST beside a frozen encoder over both modalities: taps without gradient, the side's sum, the gated input."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TappedLayer(layer) for layer in stack)
        self.side = stack.side

    def train(self, mode: bool = True) -> SideEncoder:
        super().train(mode)
        self.layers.train(False)
        return self

    def forward(self, x: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
        taps = []
        with torch.no_grad():
            y = x.detach()
            for layer in self.layers:
                y, attended, computed = layer(y, bias)
                taps.append((attended, computed))
        for rung, (attended, computed) in zip(self.side.rungs, taps, strict=True):
            for part, z in (("inter", attended), ("intra", computed)):
                text, image = z[:, :TEXT_TOKENS], z[:, TEXT_TOKENS:]
                term = getattr(self, part)
                y = y + torch.cat([term(rung["text"], text), term(rung["image"], image)], dim=1)
        return y + self.side.gate * x

    def inter(self, adapters: Any, z: Tensor) -> Tensor:
        u = F.relu(adapters.inter.down(z))
        return torch.cat([adapters.inter.unique(u), adapters.inter.shared(u)], dim=-1)

    def intra(self, adapters: Any, z: Tensor) -> Tensor:
        a = adapters.intra
        found: Tensor = a.scale * a.bottleneck.up(F.relu(a.bottleneck.down(a.norm(z))))
        return found


def bottleneck_of(module: Any) -> Any:
    """Return the module with `down` and `up`: the inserted module itself, or its `bottleneck`."""
    return module if hasattr(module, "down") else module.bottleneck
