"""Grid features: the last residual stage of CLIP's ResNet, before attention pooling (Radford et al., 2021).

The network never trains and is never counted, so all its tensors are buffers, and the features of an image can be
computed once and stored on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from petlbench.api.tokens import Images
from petlbench.backbones.parts.feature_cache import FeatureCache
from petlbench.backbones.weights.tensors import asset, load_into, on_meta, read_tensors
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean, one_line
from petlbench.core.paths import cache_dir

STRIDE = 32  # pixels per cell along each axis
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's values per RGB channel, in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
TINY: dict[str, Any] = {"layers": [1, 1, 1, 1], "width": 4}
FITS = ("crop", "squash")
REVISION = 1  # of the stored features: raise it when the same weights and options give other features
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # open_clip takes the first that exists


class GridFeatures(nn.Module):
    """A frozen CNN that maps images to (B, grid * grid, channels), row by row from the upper left.

    `cnn`: an open_clip ResNet (such as `RN101`), or `tiny`. `weights`: `pretrained` (OpenAI's), `none`, or a file in
    open_clip's layout, of the whole model or of its visual part. `fit`: `crop` (short side to `image_size`, then the
    centre) or `squash` (both sides to it). `cached`: store features on disk as float16, under `cache_dir()`; `images`
    then runs the network on new images only. Raise UserError if a name or file does not exist or weights do not fit.
    """

    def __init__(self, cnn: str, image_size: int, weights: str, *, cached: bool, fit: str) -> None:
        super().__init__()
        if image_size < STRIDE or image_size % STRIDE:
            raise UserError(f"image_size {image_size} does not divide into cells: choose a multiple of {STRIDE}")
        if fit not in FITS:
            raise UserError(f"unknown fit '{fit}'{did_you_mean(fit, FITS) or ': choose ' + ' or '.join(FITS)}")
        self.image_size, self.cached, self.fit = image_size, cached, fit
        self.grid = image_size // STRIDE
        self.note = f"image features: {'cached, float16' if cached else 'live'}"
        self.cnn = as_buffers(_network(cnn, weights))
        self.channels = STRIDE * int(_shape(cnn)["width"])
        self._fingerprint: tuple[Any, str] = (None, "")  # the state of the tensors, and its digest
        self.train(False)

    @classmethod
    def files(cls, cnn: str, weights: str) -> list[Path]:
        """Return the weight file, fetched if necessary. Raise UserError if it does not exist and cannot be fetched."""
        if weights == "none":
            return []
        return [_published(cnn) if weights == "pretrained" else asset(weights)]

    def train(self, mode: bool = True) -> GridFeatures:
        """Stay in evaluation mode, so that running statistics do not change."""
        super().train(False)
        return self

    def images(self, images: Sequence[Image]) -> Images:
        """Return fitted, normalised pixels (B, 3, image_size, image_size); if `cached`, features and no pixels.

        Raise Unwritable if the cache cannot be written.
        """
        places = [_place(image.size, self.image_size, self.fit) for image in images]
        scale = torch.tensor([scale for scale, _ in places])
        offset = torch.tensor([offset for _, offset in places])
        features = self._kept(images) if self.cached else None
        pixels = torch.zeros(len(images), 3, 0, 0) if self.cached else self._pixels(images)
        return Images(pixels, torch.ones_like(pixels[:, 0], dtype=torch.bool), scale, offset, features)

    def forward(self, images: Images) -> Tensor:
        """Return (B, grid * grid, channels) in the precision of the network's tensors."""
        if images.features is not None:
            return images.features.to(self._weight.dtype)
        return self._extract(images.pixels)

    @property
    def _weight(self) -> Tensor:
        """Return one of the network's tensors, which shows device and precision."""
        return next(self.cnn.buffers())

    @torch.no_grad()
    def _extract(self, pixels: Tensor) -> Tensor:
        return self.cnn(pixels.to(self._weight)).flatten(2).transpose(1, 2)

    def _pixels(self, images: Sequence[Image]) -> Tensor:
        return torch.stack([_fitted(image, self.image_size, self.fit) for image in images])

    def _kept(self, images: Sequence[Image]) -> Tensor:
        """Return features (B, grid * grid, channels) float16; read stored ones from disk."""
        shape = (self.grid * self.grid, self.channels)
        if self._weight.is_meta:
            return torch.zeros(len(images), *shape, dtype=torch.float16)
        # Stored features must not depend on the caller: no autocast.
        with torch.autocast(self._weight.device.type, enabled=False):
            kept = FeatureCache(cache_dir() / "features" / self.fingerprint(), shape)
            return kept.get(images, lambda unseen: self._extract(self._pixels(unseen)))

    def fingerprint(self) -> str:
        """Return the hex digest of all that features depend on besides the image: the network's tensors, and the fit.

        It is computed once, and again only after a tensor was replaced or changed.
        """
        tensors = {name: tensor for name, tensor in self.cnn.named_buffers() if tensor.is_floating_point()}
        state = [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors.values()]
        if self._fingerprint[0] != state:
            digest = hashlib.sha256(f"{REVISION} {self.image_size} {self.fit}".encode())
            for name, tensor in tensors.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
            self._fingerprint = state, digest.hexdigest()[:32]
        return self._fingerprint[1]


def as_buffers(module: nn.Module) -> nn.Module:
    """Turn every parameter of `module` into a buffer of the same name; a parameter with two names stays one tensor."""
    buffers: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, buffers.setdefault(id(parameter), parameter.detach()))
    return module


def _network(cnn: str, weights: str) -> nn.Module:
    """Return open_clip's ResNet up to its last residual stage, with weights."""
    shape = _shape(cnn)
    from open_clip.modified_resnet import ModifiedResNet

    network = ModifiedResNet(**shape, output_dim=1, heads=1)
    network.attnpool = nn.Identity()
    if weights == "none":
        return network.apply(_initialise)
    if on_meta():
        return network
    path = _published(cnn) if weights == "pretrained" else asset(weights)
    unused = [name for name in network.state_dict() if name.endswith("num_batches_tracked")]
    load_into(network, _visual(read_tensors(path)), path.name, optional=unused)
    return network


@cache
def _shape(cnn: str) -> dict[str, Any]:
    """Return the blocks of each stage, and the width. Raise UserError if open_clip has no ResNet of this name."""
    if cnn == "tiny":
        return TINY
    import open_clip

    configs = {name: open_clip.get_model_config(name)["vision_cfg"] for name in open_clip.list_models()}
    resnets = {name: config for name, config in configs.items() if isinstance(config.get("layers"), list)}
    if cnn not in resnets:
        names = [*resnets, "tiny"]
        raise UserError(f"unknown CNN '{cnn}'{did_you_mean(cnn, names) or ': choose one of ' + ', '.join(names)}")
    return {key: resnets[cnn][key] for key in ("layers", "width")}


def _source(cnn: str) -> dict[str, Any]:
    """Return open_clip's entry for OpenAI's weights. Raise UserError if there is none."""
    from open_clip.pretrained import get_pretrained_cfg

    _shape(cnn)
    if source := get_pretrained_cfg(cnn, "openai"):
        return source
    raise UserError(f"CNN '{cnn}' has no published weights: give the path of a file, or 'none'")


def _local(cnn: str) -> Path | None:
    """Return the file of OpenAI's weights in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    repository = _source(cnn).get("hf_hub", "").rstrip("/")
    paths = (try_to_load_from_cache(repository, name) for name in HUB_FILES if repository)
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def _published(cnn: str) -> Path:
    """Return the file of OpenAI's weights, fetched if necessary. Raise UserError if it cannot be fetched."""
    from open_clip.pretrained import download_pretrained

    source = _source(cnn)
    try:
        return _local(cnn) or Path(download_pretrained(source))
    except (OSError, RuntimeError) as error:
        reason = one_line(error).partition(". ")[0]
        raise UserError(
            f"the weights of CLIP {cnn} cannot be fetched ({reason}): put {HUB_FILES[0]} of {source.get('hf_hub')} "
            "into the hub's cache (HF_HOME), or give its path"
        ) from error


def _visual(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors before attention pooling, from those of a whole model or of its visual part."""
    prefix = "visual."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("attnpool.")}


def _initialise(module: nn.Module) -> None:
    """Draw convolutions so that features keep the pixels' scale at any depth; keep open_clip's biases and norms."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def _resized(size: tuple[int, int], side: int, fit: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (width, height) after resizing, and the upper left corner (x, y) of the side x side region to keep."""
    if fit == "squash":
        return (side, side), (0, 0)
    short = min(size)
    width, height = (int(side * length / short) for length in size)
    return (width, height), (round((width - side) / 2), round((height - side) / 2))


def _place(size: tuple[int, int], side: int, fit: str) -> tuple[list[float], list[float]]:
    """Return `scale` and `offset` of `Images`; points that the crop cuts off lie outside 0..1."""
    resized, corner = _resized(size, side, fit)
    scale = [after / before / side for after, before in zip(resized, size, strict=True)]
    return scale, [-start / side for start in corner]


def _fitted(image: Image, side: int, fit: str) -> Tensor:
    """Return pixels (3, side, side), normalised as for CLIP."""
    size, (left, top) = _resized(image.size, side, fit)
    rgb = image.convert("RGB").resize(size, Resampling.BICUBIC).crop((left, top, left + side, top + side))
    values = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).to(torch.float32) / 255
    mean, std = (torch.tensor(per_channel, dtype=torch.float32)[:, None, None] for per_channel in (MEAN, STD))
    return (values - mean) / std
