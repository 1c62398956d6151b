"""The published files of `beit3`: where to fetch them, and how their tensor names map to ours."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from huggingface_hub import constants as hub
from torch import Tensor
from torch.nn import functional as F

from petlbench.backbones.weights.tensors import asset
from petlbench.core.errors import UserError

RELEASE = "https://github.com/addf400/files/releases/download/beit3"
TOKENIZER = "beit3.spm"
TOKENIZER_SHA256 = "6f5e2fefcf793761a76a6bfb8ad35489f9c203b25557673284b6d032f41043f4"
ITC = {  # (width, layers): the published checkpoint, fine-tuned with an image-text contrastive loss
    (768, 12): "beit3_base_itc_patch16_224.pth",
    (1024, 24): "beit3_large_itc_patch16_224.pth",
}
UNUSED = 2  # the first rows of both position tables, as in fairseq
HEADS = "own_heads."
IMAGE_POSITIONS = "image_embedding.positions.weight"


def tokenizer_file(source: str) -> Path:
    """Return the file: beit3.spm (fetched once) for `pretrained`, or a path. Raise UserError if it does not exist."""
    return _fetched(TOKENIZER, "tokenizer", TOKENIZER_SHA256) if source == "pretrained" else asset(source)


def weights_file(source: str, width: int, layers: int) -> Path:
    """Return the file: the checkpoint of this width and depth (fetched once) for `pretrained`, or a path.

    Raise UserError if it does not exist, or if no checkpoint of these sizes was published.
    """
    if source != "pretrained":
        return asset(source)
    if (width, layers) not in ITC:
        sizes = " or ".join(f"width {width} with {layers} layers" for width, layers in ITC)
        raise UserError(
            f"no weights of beit3 at width {width} with {layers} layers were published: use {sizes}, or give "
            "`weights: none` or a path"
        )
    return _fetched(ITC[width, layers], "weights")


def _cached(name: str) -> Path:
    """Return the path at which torch.hub keeps a downloaded file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _fetched(name: str, option: str, sha256: str | None = None) -> Path:
    """Return a file of the release; download it once. Raise UserError if there is neither a copy nor a network."""
    path, url = _cached(name), f"{RELEASE}/{name}"
    if path.exists():
        return path
    advice = f"put it into {path.parent}, or set `{option}` to its path"
    if hub.HF_HUB_OFFLINE:
        raise UserError(f"{url} is not on this machine, and HF_HUB_OFFLINE is set: {advice}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:  # no network, or a file with other content
        message = " ".join(str(error).split())[:120]
        raise UserError(f"{url} cannot be downloaded ({message}): {advice}") from error
    return path


def resized_positions(table: Tensor, rows: int) -> Tensor:
    """Resize an image position table (UNUSED + 1 + g^2, d) to another grid: bicubic in float32; the first rows stay.

    Return a table that is not a square grid unchanged.
    """
    kept, grid = table[: UNUSED + 1], table[UNUSED + 1 :]
    before, after = math.isqrt(len(grid)), math.isqrt(rows - UNUSED - 1)
    if before == after or before**2 != len(grid):
        return table
    square = grid.float().T.reshape(1, -1, before, before)
    square = F.interpolate(square, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([kept, square.flatten(2)[0].T.to(table.dtype)])


def own_layout(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Rename tensors of either layout to our names. A tensor without such a name keeps its own, and loading reports it.

    A published pre-training checkpoint also holds the heads of its own objectives; they are left out.
    """
    if not any(name.startswith("beit3.") for name in tensors):
        return dict(tensors)
    rest, made = dict(tensors), {}
    for name, published in published_names(layers).items():
        if all(part in rest for part in published):
            parts = [rest.pop(part) for part in published]
            made[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    rest = {name: tensor for name, tensor in rest.items() if not name.split(".")[0].endswith(("_head", "_heads"))}
    return {**made, **rest}


def published_names(layers: int) -> dict[str, tuple[str, ...]]:
    """Map our names to published ones; if there are several, our tensor stacks them along the first axis."""
    image, text, encoder = "image_embedding", "text_embedding", "beit3.encoder"
    names: dict[str, tuple[str, ...]] = {
        f"{image}.patches.weight": ("beit3.vision_embed.proj.weight",),
        f"{image}.patches.bias": ("beit3.vision_embed.proj.bias",),
        f"{image}.cls": ("beit3.vision_embed.cls_token",),
        f"{image}.mask_token": ("beit3.vision_embed.mask_token",),
        f"{text}.tokens.weight": ("beit3.text_embed.weight",),
        IMAGE_POSITIONS: (f"{encoder}.embed_positions.A.weight",),
        f"{text}.positions.weight": (f"{encoder}.embed_positions.B.weight",),
        f"{HEADS}retrieval.image.weight": ("vision_head.weight",),
        f"{HEADS}retrieval.text.weight": ("language_head.weight",),
        f"{HEADS}retrieval.log_scale": ("logit_scale",),
    }
    for kind, letter in (("image", "A"), ("text", "B")):
        for value in ("weight", "bias"):
            names[f"stacks.encoder.final_norm.{kind}.{value}"] = (f"{encoder}.layer_norm.{letter}.{value}",)
            for i in range(layers):
                ours, theirs = f"stacks.encoder.layers.{i}.sublayers", f"{encoder}.layers.{i}"
                attention, ffn = f"{ours}.attention", f"{ours}.ffn"
                of_layer = {
                    f"{attention}.norm.{kind}": [f"self_attn_layer_norm.{letter}"],
                    f"{attention}.core.qkv.{kind}": [f"self_attn.{role}_proj.{letter}" for role in "qkv"],
                    f"{attention}.core.norm.{kind}": [f"self_attn.inner_attn_ln.{letter}"],
                    f"{attention}.core.proj.{kind}": [f"self_attn.out_proj.{letter}"],
                    f"{ffn}.norm.{kind}": [f"final_layer_norm.{letter}"],
                    f"{ffn}.core.module.{kind}.fc1": [f"ffn.{letter}.fc1"],
                    f"{ffn}.core.module.{kind}.norm": [f"ffn.{letter}.ffn_layernorm"],
                    f"{ffn}.core.module.{kind}.fc2": [f"ffn.{letter}.fc2"],
                }
                for name, parts in of_layer.items():
                    names[f"{name}.{value}"] = tuple(f"{theirs}.{part}.{value}" for part in parts)
    return names
