"""Arrays of one shape on disk, one file per image, so that what never trains is computed once."""

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
    """Hex digest of what an image shows: two files with the same RGB pixels are one image."""
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
        """The array, mapped from its file, or None where there is none or the file is damaged."""
        try:
            found = np.lib.format.open_memmap(self.path(digest), mode="r")
        except Exception:  # numpy's reader fails in many ways on a damaged file, and a new file mends all of them
            return None
        return found if found.shape == self.shape and found.dtype == np.float16 else None

    def write(self, digest: str, values: np.ndarray) -> None:
        """Keep an array. Raises Unwritable when the disk is full or the folder cannot be written."""
        path = self.path(digest)
        if not path.parent.is_dir():
            make_folder(path.parent)
        data = BytesIO()
        np.save(data, values)
        write_atomic(path, data.getvalue())

    def get(self, images: Sequence[Image], compute: Callable[[list[Image]], Tensor]) -> Tensor:
        """(B, *shape) float16: what is kept of `images`; the rest by one `compute` of distinct ones, kept for later.

        Raises UserError when a computed value is outside the range of float16, and Unwritable as `write` does.
        """
        digests = [image_digest(image) for image in images]
        found = {digest: self.read(digest) for digest in digests}
        missing = {digest: image for digest, image in zip(digests, images, strict=True) if found[digest] is None}
        if missing:
            computed = compute(list(missing.values())).to("cpu", torch.float16)
            if not computed.isfinite().all():
                raise UserError("image features are too large for the float16 of the cache: compute them live instead")
            for digest, values in zip(missing, computed.numpy(), strict=True):
                self.write(digest, values)
                found[digest] = values
        rows = np.empty((len(images), *self.shape), np.float16)
        for row, digest in zip(rows, digests, strict=True):
            row[...] = found[digest]
        return torch.from_numpy(rows)
