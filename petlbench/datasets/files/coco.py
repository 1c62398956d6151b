"""Where the images of COCO lie, and how they are named; half of the field's data sets are about them."""

from __future__ import annotations

COCO_IMAGES = (
    "images: http://images.cocodataset.org/zips/train2014.zip and val2014.zip, unpacked to coco/train2014, coco/val2014"
)
# Folders below the data root that hold train2014 and val2014, as people and the field's repositories have them.
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
    """`train2014`, 9 -> `train2014/COCO_train2014_000000000009.jpg`; of 2017, the number alone."""
    prefix = "" if folder.endswith("2017") else f"COCO_{folder}_"
    return f"{folder}/{prefix}{image_id:012d}.jpg"


def placed(name: str) -> str:
    """`COCO_train2014_000000000009.jpg` with the folder that it says, if it says one and has none."""
    if "/" in name or not name.startswith("COCO_"):
        return name
    return f"{name.split('_')[1]}/{name}"
