"""Split open_clip's towers, its own or timm's vision transformers, into stems, stacks of layers and token poolers.

Modules that a library applies to all tokens belong to a tower; modules that it applies only to the pooled token (a
pooling module, a norm after pooling, the projection) belong to a `TokenPooler`, half of the image-text retrieval head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.sites import Stack
from petlbench.api.tokens import Tokens
from petlbench.backbones.parts.open_clip_parts import block_layer, timm_layer
from petlbench.core.errors import UserError


class PatchStem(nn.Module):
    """Turn pixels into the input of open_clip's vision transformer: a class token, then patches, with positions."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.conv1, self.grid, self.prefix = visual.conv1, visual.grid_size, 1
        self.class_embedding, self.positional_embedding = visual.class_embedding, visual.positional_embedding

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, d)."""
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.positional_embedding


class TimmStem(nn.Module):
    """The stem of timm's vision transformer: the model without its layers, norms and pooling."""

    def __init__(self, trunk: TimmTransformer) -> None:
        super().__init__()
        self.trunk, self.grid, self.prefix = trunk, trunk.patch_embed.grid_size, trunk.num_prefix_tokens
        trunk.blocks = nn.Sequential()
        for name in ("norm_pre", "norm", "attn_pool", "fc_norm", "head_drop", "head"):
            setattr(trunk, name, nn.Identity())

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, prefix + N, d)."""
        return self.trunk._pos_embed(self.trunk.patch_embed(pixels))


class TextStem(nn.Module):
    """Turn token ids into the input of the text tower: words with positions and, in CoCa, a class token at the end."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.token_embedding: nn.Embedding = source.token_embedding
        self.positional_embedding: nn.Parameter = source.positional_embedding
        self.class_embedding: nn.Parameter | None = getattr(source, "cls_emb", None)

    def words(self, ids: Tensor) -> Tensor:
        """(B, N) -> (B, N, d)."""
        return self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]

    def forward(self, ids: Tensor) -> Tensor:
        """(B, N) -> (B, N, d), or (B, N + 1, d) with the class token."""
        x = self.words(ids)
        if self.class_embedding is None:
            return x
        last = (self.class_embedding + self.positional_embedding[ids.shape[1]]).expand(len(ids), 1, -1)
        return torch.cat([x, last], dim=1)


class Matrix(nn.Module):
    """The product x W, with W (in, out) as in open_clip."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class LatentPool(nn.Module):
    """timm's pooling by attention from a learned query, over all tokens except the first `skip`."""

    def __init__(self, pool: nn.Module, skip: int) -> None:
        super().__init__()
        self.pool, self.skip = pool, skip

    def forward(self, states: Tensor) -> Tensor:
        """(B, N, d) -> (B, d)."""
        return self.pool(states[:, self.skip :])


class TokenPooler(nn.Module):
    """Pool, norm and project the tokens of a tower to unit vectors (B, e)."""

    def __init__(self, projection: nn.Module, *, pool: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.pool, self.norm, self.projection = pool, norm or nn.Identity(), projection

    def forward(self, tokens: Tokens) -> Tensor:
        x = tokens.pooled() if self.pool is None else self.pool(tokens.states)
        return F.normalize(self.projection(self.norm(x)), dim=-1)


@dataclass(frozen=True)
class ImageTower:
    """The parts of an image tower.

    `drop`: how many tokens to remove from the start of the output. `marked`: the first token represents the image.
    `resampler` (CoCa): pooling by attention from several queries, whose outputs are the image tokens.
    """

    stem: PatchStem | TimmStem
    stack: Stack
    reader: TokenPooler
    width: int
    marked: bool
    drop: int = 0
    resampler: nn.Module | None = None


@dataclass(frozen=True)
class TextTower:
    """The parts of a text tower.

    `pooling`: which token represents the text: argmax (the highest id), eos, first or last.
    """

    stem: TextStem
    stack: Stack
    reader: TokenPooler
    pooling: str
    causal: bool
    eos_id: int
    pad_id: int


def _or_none(module: nn.Module) -> nn.Module | None:
    return None if isinstance(module, nn.Identity) else module


def image_tower(visual: nn.Module) -> ImageTower:
    """Split an open_clip image tower into its parts. Raise UserError if it is not a plain vision transformer."""
    if isinstance(visual, VisionTransformer):
        return _own_image_tower(visual)
    if isinstance(visual, TimmModel) and type(visual.trunk) is TimmTransformer:
        return _timm_image_tower(visual)
    class_name = type(getattr(visual, "trunk", visual)).__name__
    raise UserError(f"clip does not support image towers of class {class_name}: choose a plain vision transformer")


def _own_image_tower(visual: VisionTransformer) -> ImageTower:
    resampled, late_norm = visual.attn_pool is not None, visual.final_ln_after_pool and visual.attn_pool is None
    if visual.pool_type not in ("tok", "avg") or getattr(visual, "attn_pool_contrastive", None) is not None:
        raise UserError("clip does not support image towers with two poolings or none: choose another model")
    if resampled and visual.pool_type == "avg":
        raise UserError("clip does not support image towers that average over pooled tokens: choose another model")
    width = visual.conv1.out_channels
    stack = Stack(
        [block_layer(block) for block in visual.transformer.resblocks],
        width=width,
        embedding_norm=_or_none(visual.ln_pre),
        final_norm=None if resampled or late_norm else visual.ln_post,
    )
    return ImageTower(
        stem=PatchStem(visual),
        stack=stack,
        reader=TokenPooler(Matrix(visual.proj), norm=visual.ln_post if late_norm else None),
        width=visual.ln_post.normalized_shape[0],
        marked=visual.pool_type == "tok",
        drop=int(visual.pool_type == "avg"),
        resampler=nn.Sequential(visual.attn_pool, visual.ln_post) if resampled else None,
    )


def _timm_image_tower(visual: TimmModel) -> ImageTower:
    trunk = visual.trunk
    if trunk.global_pool not in ("token", "avg", "map") or hasattr(visual.head, "pool"):
        raise UserError(f"clip does not support pooling '{trunk.global_pool}' of an image tower: choose another model")
    skip = 0 if trunk.pool_include_prefix else trunk.num_prefix_tokens
    pool = LatentPool(trunk.attn_pool, skip) if trunk.attn_pool is not None else None
    parts = [part for part in (trunk.head_drop, trunk.head, visual.head) if list(part.parameters()) or _drops(part)]
    reader = TokenPooler(nn.Sequential(*parts), pool=pool, norm=_or_none(trunk.fc_norm))
    stack = Stack(
        [timm_layer(block) for block in trunk.blocks],
        width=trunk.embed_dim,
        embedding_norm=_or_none(trunk.norm_pre),
        final_norm=_or_none(trunk.norm),
    )
    pooling = trunk.global_pool
    stem = TimmStem(trunk)
    drop = skip if pooling == "avg" else 0
    return ImageTower(stem, stack, reader, trunk.embed_dim, marked=pooling == "token", drop=drop)


def _drops(part: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in part.modules())


def text_tower(model: Any) -> TextTower:
    """Split the text tower of an open_clip model into its parts, whether it is the model itself or its `text`."""
    source = getattr(model, "text", model)
    stem = TextStem(source)
    projection = source.text_projection
    if projection is None:
        projection = nn.Identity()
    elif isinstance(projection, nn.Parameter):
        projection = Matrix(projection)
    late_norm = stem.class_embedding is not None  # CoCa norms only what it pools
    stack = Stack(
        [block_layer(block) for block in source.transformer.resblocks],
        width=source.token_embedding.embedding_dim,
        final_norm=None if late_norm else source.ln_final,
    )
    pooling = "last" if late_norm else str(getattr(source, "pool_type", None) or source.text_pool_type)
    if pooling not in ("argmax", "eos", "first", "last"):
        raise UserError(f"clip does not support pooling '{pooling}' of a text tower: choose another model")
    return TextTower(
        stem,
        stack,
        TokenPooler(projection, norm=source.ln_final if late_norm else None),
        pooling,
        causal=source.attn_mask is not None,
        eos_id=int(getattr(source, "eos_id", getattr(source, "text_eos_id", 2))),
        pad_id=int(getattr(source, "pad_id", 0)),
    )


def caption_decoder(decoder: Any) -> tuple[Stack, Matrix]:
    """Return the layers of CoCa's decoder over the text tower's states, and its projection to words."""
    blocks = zip(decoder.resblocks, decoder.cross_attn, strict=True)
    layers = [block_layer(block, crossing) for block, crossing in blocks]
    stack = Stack(layers, width=decoder.ln_final.normalized_shape[0], final_norm=decoder.ln_final)
    return stack, Matrix(decoder.text_projection)
