"""The transformer image encoder of `tiny`: a convolutional stem, then pre-norm layers with sites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from petlbench.api.sites import Stack
from petlbench.api.tokens import Images
from petlbench.backbones.parts.grids import cell_centres
from petlbench.backbones.parts.transformers_parts import clip_layer

STRIDE = 8  # pixels per token along each axis: three convolutions of stride 2


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return (rows * columns, width): half the channels code x, half y, by sines, cosines of geometric frequencies."""
    quarter = width // 4
    rate = torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)
    x = torch.arange(columns)[None, :, None] * rate
    y = torch.arange(rows)[:, None, None] * rate
    parts = [x.sin(), x.cos(), y.sin(), y.cos()]
    grid = torch.cat([part.expand(rows, columns, quarter) for part in parts], dim=-1)
    return grid.reshape(rows * columns, 4 * quarter)


def vision_stack(width: int, layers: int, heads: int, ffn: int, drop: float, attention: str) -> Stack:
    """Build pre-norm layers and a final norm."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="gelu",
        attention_dropout=drop,
        attn_implementation=attention,
    )
    built = [clip_layer(CLIPEncoderLayer(config), drop) for _ in range(layers)]
    return Stack(built, width=width, final_norm=nn.LayerNorm(width)).apply(_initialise)


class MaskedNorm(nn.GroupNorm):
    """Normalise (B, C, H, W) over channels and real positions, by a mask (B, 1, H, W).

    Statistics leave out padding, so that images in one batch do not change each other.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        if bool(mask.all()):
            return super().forward(x)
        real = mask.to(x.dtype)
        count = real.sum((1, 2, 3), keepdim=True) * x.shape[1]
        mean = (x * real).sum((1, 2, 3), keepdim=True) / count
        variance = ((x - mean).square() * real).sum((1, 2, 3), keepdim=True) / count
        x = (x - mean) * (variance + self.eps).rsqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ImageTokenizer(nn.Module):
    """Turn images of any size into one token per 8 x 8 pixels, by three convolutions and sine positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [3, width // 4, width // 2, width]
        stages: list[nn.Module] = []
        for before, after in pairwise(channels):
            stages += [nn.Conv2d(before, after, 3, stride=2, padding=1), MaskedNorm(after), nn.GELU()]
        self.stem = nn.Sequential(*stages, nn.Conv2d(width, width, 1))
        self.apply(_initialise)

    def forward(self, images: Images) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, N, width), their mask (B, N), and their centres (B, N, 2) in pixels."""
        features, mask = images.pixels, images.mask[:, None]
        for module in self.stem:
            if isinstance(module, MaskedNorm):
                mask = mask[..., ::2, ::2]
                features = module(features, mask)
            else:
                features = module(features)
                if isinstance(module, nn.GELU):
                    features = features * mask  # otherwise padding would enter the next convolution
        batch, width, rows, columns = features.shape
        x = features.flatten(2).transpose(1, 2)
        x = x + sine_positions(rows, columns, width).to(x)
        mask = images.mask[:, ::STRIDE, ::STRIDE].flatten(1)
        return x, mask, (cell_centres(rows, columns).to(x) * STRIDE).expand(batch, -1, -1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def preprocess(images: Sequence[Image], side: int) -> Images:
    """Resize the short side to `side`, keep the aspect; pad below and right to whole tokens and the largest image."""
    arrays, scales = [], []
    for image in images:
        scale = side / min(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        rgb = image.convert("RGB")
        rgb = rgb if rgb.size == size else rgb.resize(size, Resampling.BICUBIC)
        arrays.append(torch.from_numpy(np.asarray(rgb, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1)
        scales.append(scale / side)
    height, width = (max(a.shape[axis] for a in arrays) for axis in (1, 2))
    height, width = (-(-length // STRIDE) * STRIDE for length in (height, width))
    pixels = torch.stack([F.pad(a, (0, width - a.shape[2], 0, height - a.shape[1])) for a in arrays])
    mask = torch.zeros(len(arrays), height, width, dtype=torch.bool)
    for row, a in zip(mask, arrays, strict=True):
        row[: a.shape[1], : a.shape[2]] = True
    both = torch.tensor(scales)[:, None].expand(-1, 2)
    return Images(pixels, mask, both, torch.zeros_like(both))
