"""Small random backbones in double precision, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig

from petlbench.api.backbone import Backbone
from petlbench.api.sites import Stack
from petlbench.backbones.tiny import Tiny, TinyConfig

SMALL: dict[str, Any] = {
    "image_size": 32,
    "vision_width": 16,
    "vision_layers": 2,
    "vision_heads": 2,
    "vision_ffn": 24,
    "width": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "heads": 4,
    "ffn": 40,
    "max_positions": 64,
}


def randomise(module: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Draw every parameter again, around one for gains and zero for all others, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = float(parameter.ndim == 1 and name.endswith("weight"))
            parameter.copy_(gain + torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return module


def small_tiny(seed: int = 0, std: float = 0.3, **sizes: Any) -> Tiny:
    """Return a random `tiny` in double precision and evaluation mode."""
    backbone = Tiny(TinyConfig(**{"weights": "none", "dropout": 0.1} | SMALL | sizes))
    randomise(backbone, seed, std)
    return backbone.eval()


def bart_config(width: int, heads: int, ffn: int) -> BartConfig:
    """Return a configuration without dropout; the caller sets the number of layers."""
    sides = {
        f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("attention_heads", heads), ("ffn_dim", ffn))
    }
    return BartConfig(d_model=width, dropout=0.0, attn_implementation="eager", **sides)


def posing(module: nn.Module) -> Any:
    """Make `module` usable as a backbone in tests that need only its parameters."""
    module.roles, module.undecayed_parameters = tuple, set  # type: ignore[assignment]
    module.host_parameters = module.head_parameters = set  # type: ignore[assignment]
    module.fused_attention = True  # type: ignore[assignment]
    return module


class Bare(Backbone):
    """A backbone with stacks and nothing else: enough for a method to adapt."""

    abilities = frozenset()

    def __init__(self, **stacks: Stack) -> None:
        super().__init__()
        self.stacks.update(stacks)

    def host_parameters(self) -> set[str]:
        return set()

    def _absent(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    images = texts = text_of = embed_image = embed_text = fuse = _absent


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return a seeded normal tensor in double precision."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
