"""What sources need to know about image files before a run depends on them."""

from __future__ import annotations

from pathlib import Path


def fault(path: Path, size: tuple[int, int] | None = None) -> str | None:
    """Why the file cannot be used, in a few words, or None when it decodes in full.

    `size`, (width, height) in pixels, is demanded where boxes are given in the stored image's pixels.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            found = image.size
    except FileNotFoundError:
        return "missing"
    # Pillow's decoders raise whatever a damaged stream makes them stumble over; all of it means the same here.
    except Exception as error:
        return " ".join(str(error).replace(str(path), "file").split()) or type(error).__name__
    if size is not None and found != size:
        return f"{found[0]} x {found[1]} pixels, not {size[0]} x {size[1]}"
    return None
