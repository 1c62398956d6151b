"""Folders and file names of COCO's images, which half of the field's data sets use."""

from __future__ import annotations

COCO_IMAGES = (
    "images: http://images.cocodataset.org/zips/train2014.zip and val2014.zip, unpacked to coco/train2014, coco/val2014"
)
# Folders below the data root in which people and the field's repositories keep train2014 and val2014.
COCO_BASES = (
    "",
    "images",
    "coco",
    "coco/images",
    "mscoco",
    "mscoco/images",
    "other/images",
    "other/images/mscoco/images",
)


def image_name(folder: str, image_id: int) -> str:
    """Return `train2014/COCO_train2014_000000000009.jpg` for `train2014` and 9; names of 2017 are the number alone."""
    prefix = "" if folder.endswith("2017") else f"COCO_{folder}_"
    return f"{folder}/{prefix}{image_id:012d}.jpg"


def with_folder(name: str) -> str:
    """Return `train2014/COCO_train2014_...jpg` for `COCO_train2014_...jpg`; any other name passes through."""
    if "/" in name or not name.startswith("COCO_"):
        return name
    return f"{name.split('_')[1]}/{name}"
