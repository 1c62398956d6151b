"""Keep arrays of one shape on disk, one file per image, so that features that never train are computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from petlbench.core.errors import UserError
from petlbench.core.files import make_folder, write_atomic


def image_digest(image: Image) -> str:
    """Return the hex digest of an image's RGB pixels: two files with the same pixels are one image."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    digest = hashlib.blake2b(f"{rgb.mode} {rgb.width} {rgb.height} ".encode(), digest_size=16)
    digest.update(rgb.tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Float16 arrays of `shape` under `folder`, by digest: `folder/ab/<digest>.npy`. Several processes can share it."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder, self.shape = folder, shape

    def path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.npy"

    def read(self, digest: str) -> np.ndarray | None:
        """Return the array, mapped from its file; None if the file is missing or damaged."""
        try:
            array = np.lib.format.open_memmap(self.path(digest), mode="r")
        except Exception:  # numpy's reader fails in many ways on a damaged file; writing a new file fixes all of them
            return None
        return array if array.shape == self.shape and array.dtype == np.float16 else None

    def write(self, digest: str, values: np.ndarray) -> None:
        """Store an array. Raise Unwritable if the disk is full or the folder cannot be written."""
        path = self.path(digest)
        if not path.parent.is_dir():
            make_folder(path.parent)
        data = BytesIO()
        np.save(data, values)
        write_atomic(path, data.getvalue())

    def get(self, images: Sequence[Image], compute: Callable[[list[Image]], Tensor]) -> Tensor:
        """Return the arrays (B, *shape) float16 of `images`; compute missing ones in one call, and store them.

        Raise UserError if a computed value is outside the range of float16, and Unwritable as `write` does.
        """
        digests = [image_digest(image) for image in images]
        arrays = {digest: self.read(digest) for digest in digests}
        missing = {digest: image for digest, image in zip(digests, images, strict=True) if arrays[digest] is None}
        if missing:
            computed = compute(list(missing.values())).to("cpu", torch.float16)
            if not computed.isfinite().all():
                raise UserError("image features are too large for the float16 of the cache: compute them live instead")
            for digest, values in zip(missing, computed.numpy(), strict=True):
                self.write(digest, values)
                arrays[digest] = values
        rows = np.empty((len(images), *self.shape), np.float16)
        for row, digest in zip(rows, digests, strict=True):
            row[...] = arrays[digest]
        return torch.from_numpy(rows)
