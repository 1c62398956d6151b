"""open_clip's models by name: architecture, published weights, tokenizers and preprocessing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg
from PIL import Image as Pillow
from PIL.Image import Image, Resampling
from timm.models import is_model_in_modules
from torch import Tensor, nn

from petlbench.api.codec import Codec
from petlbench.backbones.weights.library_codec import file_codec
from petlbench.backbones.weights.library_models import tokenizer_files
from petlbench.backbones.weights.tensors import asset, load_into, read_tensors
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean, one_line

SIMPLE_PAD = 0  # CLIP's own tokenizer pads with the id of a piece that no text of whole words contains

_TINY_VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
_TINY_TEXT = {"context_length": 77, "vocab_size": 256, "width": 24, "heads": 2, "layers": 2}
TINY: Mapping[str, dict[str, Any]] = {  # sizes for tests, with the ids of the packaged tokenizer
    "tiny": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": _TINY_VISION,
        "text_cfg": {**_TINY_TEXT, "pool_type": "eos", "eos_id": 2, "pad_id": 1},
    },
    "coca-tiny": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {
            **_TINY_VISION,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "attn_pooler_queries": 5,
            "output_tokens": True,
        },
        "text_cfg": {**_TINY_TEXT, "embed_cls": True, "output_tokens": True, "pad_id": 1},
        "multimodal_cfg": {**_TINY_TEXT, "attn_pooler_heads": 2},
    },
}


def architecture(model: str) -> dict[str, Any] | None:
    """Return the configuration of the towers; None if the name does not exist."""
    return TINY[model] if model in TINY else open_clip.get_model_config(model)


def model_names() -> list[str]:
    return [*TINY, *open_clip.list_models()]


def tags(model: str) -> list[str]:
    """Return the names of the model's published weights; OpenAI's come first."""
    return sorted(open_clip.list_pretrained_tags_by_model(model), key=lambda tag: tag != "openai")


def weights_entry(model: str, tag: str | None) -> dict[str, Any]:
    """Return open_clip's entry for the weights `tag` (None: the first): location, preprocessing, activation."""
    tag = tag or next(iter(tags(model)), None)
    return dict(open_clip.get_pretrained_cfg(model, tag)) if tag else {}


def unsupported_reason(model: str, tag: str | None, weights: str) -> str | None:
    """Return why this model cannot be built, or None if it can."""
    towers = architecture(model)
    if towers is None:
        return f"open_clip has no model '{model}'" + (
            did_you_mean(model, model_names()) or ": see open_clip.list_models()"
        )
    if tag is not None and not weights_entry(model, tag):
        existing = tags(model)
        return f"{model} has no weights '{tag}'" + (did_you_mean(tag, existing) or f": there are {', '.join(existing)}")
    if weights == "pretrained" and not tags(model):
        return f"{model} has no published weights: give weights: none, or a file"
    vision, text = towers["vision_cfg"], towers["text_cfg"]
    if text.get("hf_model_name"):
        return f"{model} has a text tower of transformers, which clip does not take apart: choose another model"
    trunk = vision.get("timm_model_name")
    plain = ["vision_transformer", "vision_transformer_hybrid"]
    if isinstance(vision.get("layers"), list | tuple) or (trunk and not is_model_in_modules(trunk, plain)):
        return f"{model} has no plain vision transformer ({trunk or 'ResNet'}): choose a ViT-… or …SigLIP model"
    if not isinstance(vision.get("image_size", 224), int):
        return f"{model} has images that are not square: choose another model"
    return None


def build(model: str, tag: str | None) -> nn.Module:
    """Return the library's model without its weights, on the default device, with the activation of the weights."""
    towers = architecture(model)
    assert towers is not None
    options = {**towers, "vision_cfg": {**towers["vision_cfg"], "patch_dropout": 0.0}}
    options["quick_gelu"] = towers.get("quick_gelu", False) or weights_entry(model, tag).get("quick_gelu", False)
    custom = options.pop("custom_text", False)
    cls: Any = open_clip.CLIP
    if custom:
        cls = open_clip.CoCa if "multimodal_cfg" in options else open_clip.CustomTextCLIP
    built: Any = cls(**options)
    if cls is open_clip.CoCa:  # the library does not initialise its projection to words
        words = built.text_decoder.text_projection
        nn.init.normal_(words, std=words.shape[0] ** -0.5)
    return built


def published_file(model: str, tag: str | None) -> Path:
    """Return the file of published weights, fetched if necessary. Raise UserError if it cannot be fetched."""
    path = cached_file(model, tag)
    if path is not None:
        return path
    where = weights_entry(model, tag)
    try:
        if not where.get("hf_hub") and os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            raise OSError("HF_HUB_OFFLINE is set")
        return Path(open_clip.download_pretrained(where))
    except Exception as error:
        message = one_line(error)[:120]
        raise UserError(
            f"weights '{tag or tags(model)[0]}' of {model} cannot be fetched ({message}): put {_how_to_place(where)}, "
            "or give weights: FILE"
        ) from error


def _hub_names(where: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the repository, and the file names that open_clip tries in it, in its order."""
    repository, name = os.path.split(where["hf_hub"])
    name = name or HF_WEIGHTS_NAME
    if name == HF_WEIGHTS_NAME:
        return repository, [HF_SAFE_WEIGHTS_NAME, name]
    stem, suffix = os.path.splitext(name)
    return repository, [f"{stem}.safetensors", name] if suffix in (".bin", ".pth") else [name]


def _url_file(where: Mapping[str, Any]) -> Path:
    return Path("~/.cache/clip").expanduser() / os.path.basename(where.get("url", ""))


def _how_to_place(where: Mapping[str, Any]) -> str:
    if not where.get("hf_hub"):
        return f"{where.get('url')} at {_url_file(where)}"
    repository, files = _hub_names(where)
    return f"{files[0]} of {repository} into the hub's cache (HF_HOME; `hf download {repository} {files[0]}`)"


def cached_file(model: str, tag: str | None) -> Path | None:
    """Return the file of published weights if this machine has it, else None; use no network."""
    where = weights_entry(model, tag)
    if where.get("hf_hub"):
        repository, files = _hub_names(where)
        paths = [try_to_load_from_cache(repository, name) for name in files]
        return next((Path(path) for path in paths if isinstance(path, str)), None)
    path = _url_file(where)
    return path if where.get("url") and path.is_file() else None


def published_tokenizer(model: str) -> list[Path]:
    """Return the files of a tokenizer on the hub, fetched if necessary. CLIP's own tokenizer comes with open_clip."""
    repository = (architecture(model) or {}).get("text_cfg", {}).get("hf_tokenizer_name")
    return tokenizer_files(repository) if repository else []


def load_published(model: nn.Module, path: Path) -> None:
    """Load a file in a layout that open_clip reads into its model; unpickle nothing. Raise UserError if it fails."""
    try:
        open_clip.load_checkpoint(model, str(path), weights_only=True)
    except Exception as error:
        load_into(model, read_tensors(path), path.name)  # raises the reason if names or shapes do not fit
        raise UserError(f"weights {path.name} cannot be loaded ({one_line(error)[:120]}): give another file") from error


class ClipCodec(Codec):
    """open_clip's tokenizer of a model, loaded at its first use, since some come from the hub."""

    def __init__(self, model: str, folder: Path | None = None) -> None:
        """Take `folder`, a tokenizer in transformers' layout, in place of the one on the hub."""
        self.model, self.folder = model, folder

    @cached_property
    def library(self) -> Any:
        text = (architecture(self.model) or {})["text_cfg"]
        name = str(self.folder or text.get("hf_tokenizer_name") or "")
        options = {"context_length": text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})}
        try:
            return HFTokenizer(name, **options) if name else SimpleTokenizer(**options)
        except Exception as error:
            raise UserError(
                f"tokenizer {name} of {self.model} cannot be loaded ({one_line(error)[:120]}): put {name} into the "
                "hub's cache (HF_HOME), or give tokenizer: FOLDER"
            ) from error

    @cached_property
    def _ids(self) -> tuple[int, int, int]:
        """Return the ids of start, end and padding. If the end is stripped (CLIPA), the first padding is the end."""
        library = self.library
        if isinstance(library, SimpleTokenizer):
            return library.sot_token_id, library.eot_token_id, SIMPLE_PAD
        tokenizer = library.tokenizer
        pad = tokenizer.pad_token_id or 0
        eos = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        start = next((i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id) if i is not None), pad)
        return start, 0 if getattr(library, "strip_sep_token", False) else eos, pad

    @property
    def start_id(self) -> int:  # type: ignore[override]
        return self._ids[0]

    @property
    def eos_id(self) -> int:  # type: ignore[override]
        return self._ids[1]

    @property
    def pad_id(self) -> int:  # type: ignore[override]
        return self._ids[2]

    def __len__(self) -> int:
        library = self.library
        return int(library.vocab_size) if isinstance(library, SimpleTokenizer) else len(library.tokenizer)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        length = min(max_length, int(self.library.context_length))
        ids: Tensor = self.library(list(texts), context_length=length)
        ends = ids == self.eos_id
        last = torch.where(ends.any(1), ends.int().argmax(1), length - 1)
        longest = int(last.max()) + 1 if len(ids) else 0
        return ids[:, :longest], torch.arange(longest) <= last[:, None]

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i not in self._ids and i < len(self)]
        library = self.library
        text = (
            library.decode(kept)
            if isinstance(library, SimpleTokenizer)
            else library.tokenizer.decode(kept, skip_special_tokens=True)
        )
        return str(text).strip()


def codec_of(model: str, tokenizer: str | None) -> Codec:
    """Return the model's own tokenizer, or that of a folder or a `tokenizers` file."""
    if tokenizer is None:
        return ClipCodec(model)
    folder = Path(tokenizer)
    return ClipCodec(model, folder) if folder.is_dir() else file_codec(asset(tokenizer))


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop or pad to `side` x `side`, then normalise, as open_clip's transform for evaluation."""

    side: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    resize_mode: str  # shortest (side to `side`, then the centre), longest (padded), squash
    fill_color: int

    @classmethod
    def of(cls, model: str, tag: str | None) -> Preprocessing:
        """Return the preprocessing of the published weights `tag`."""
        plain, where = PreprocessCfg(), weights_entry(model, tag)
        towers = architecture(model)
        assert towers is not None
        options = {
            name: where.get(name) or getattr(plain, name)
            for name in ("mean", "std", "interpolation", "resize_mode", "fill_color")
        }
        return cls(side=towers["vision_cfg"].get("image_size", 224), **options)

    def __call__(self, image: Image) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return pixels (3, S, S), the mask (S, S) of real ones, and scale (2,) and offset (2,) as in `Images`."""
        side, size = self.side, self._resized(*image.size)
        bilinear = self.interpolation == "bilinear"
        resized = image.resize(size, Resampling.BILINEAR if bilinear else Resampling.BICUBIC).convert("RGB")
        place = tuple((side - length) // 2 if length < side else -round((length - side) / 2) for length in size)
        canvas = Pillow.new("RGB", (side, side), (self.fill_color,) * 3)
        canvas.paste(resized, (place[0], place[1]))
        pixels = torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        mask = torch.zeros(side, side, dtype=torch.bool)
        mask[max(place[1], 0) : place[1] + size[1], max(place[0], 0) : place[0] + size[0]] = True
        scale = torch.tensor([new / old / side for new, old in zip(size, image.size, strict=True)])
        return (pixels - mean) / std, mask, scale, torch.tensor(place) / side

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        side = self.side
        if self.resize_mode == "squash":
            return side, side
        if self.resize_mode == "longest":
            ratio = max(width / side, height / side)
            return round(width / ratio), round(height / ratio)
        longer = int(side * max(width, height) / min(width, height))
        return (side, longer) if width <= height else (longer, side)
