"""Draw data and predictions: boxes on an image, and a sheet of captioned images."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

Box = tuple[float, ...]
TEXT_PIXELS = 13
LINE_PIXELS = 17
PADDING = 8
MIN_CELL_PIXELS = 160


def draw_boxes(
    image: Image, boxes: list[tuple[Box, str, str]], scale: int = 1, outline_pixels: int | None = None
) -> Image:
    """Return an RGB copy of `image`, enlarged `scale` times, with an outlined, labelled rectangle for each box.

    A box is ((x, y, width, height) in pixels of `image`, label, colour name); an empty label is not drawn. Boxes are
    clipped to the image. A box that is not finite or has no area (an untrained model predicts such boxes) shows its
    label only. Outlines are `outline_pixels` wide, or `scale` pixels by default.
    """
    from PIL import Image as Images
    from PIL import ImageDraw

    canvas = _on_white(image)
    canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Images.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    corners = [_corners(box, scale, canvas.size) for box, _, _ in boxes]
    for rectangle, (_, _, colour) in zip(corners, boxes, strict=True):
        if rectangle:
            draw.rectangle(rectangle, outline=colour, width=max(1, scale) if outline_pixels is None else outline_pixels)
    # Draw labels last, so that no outline crosses one.
    for rectangle, (_, label, colour) in zip(corners, boxes, strict=True):
        if label:
            _tag(draw, rectangle, label, colour, canvas.size)
    return canvas


def contact_sheet(images: list[Image], captions: list[str], columns: int) -> Image:
    """Return one picture of all `images` in rows of `columns`; each caption stands below its image, wrapped to fit.

    Raises ValueError if there is no image, `columns` is not positive, or captions and images differ in number.
    """
    from PIL import Image as Images
    from PIL import ImageDraw

    if not images or columns < 1 or len(images) != len(captions):
        raise ValueError(f"{len(images)} images, {len(captions)} captions and {columns} columns make no contact sheet")
    cell = max(MIN_CELL_PIXELS, *(image.width for image in images))
    lines = [wrap(caption, cell) for caption in captions]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [(max(images[i].height for i in row), max(len(lines[i]) for i in row) * LINE_PIXELS) for row in rows]
    width = PADDING + min(columns, len(images)) * (cell + PADDING)
    sheet = Images.new("RGB", (width, PADDING + sum(a + b + 2 * PADDING for a, b in heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = PADDING
    for row, (picture, text) in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = PADDING + column * (cell + PADDING)
            sheet.paste(_on_white(images[i]), (left, top))
            for number, line in enumerate(lines[i]):
                draw.text((left, top + picture + 2 + number * LINE_PIXELS), line, "black", font())
        top += picture + text + 2 * PADDING
    return sheet


def fitted(image: Image, side: int) -> tuple[Image, tuple[float, float]]:
    """Return `image` in RGB with no side longer than `side` pixels, and the scale (across, down) to apply to its boxes.

    Small images grow by a whole factor, so that pixels stay square.
    """
    from PIL import Image as Images

    longest = max(image.size)
    scale = side / longest if longest > side else max(1, side // longest)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if size == image.size:
        return _on_white(image), (1.0, 1.0)
    # Scale before converting where the mode allows it: a converted copy of a large picture takes hundreds of megabytes.
    plain = image if image.mode in ("L", "RGB", "RGBA") else _on_white(image)
    smaller = plain.resize(size, Images.Resampling.BOX if scale < 1 else Images.Resampling.NEAREST)
    return _on_white(smaller), (size[0] / image.width, size[1] / image.height)


def beside(images: list[Image]) -> Image:
    """Return one picture of the images (at least one) side by side on white."""
    from PIL import Image as Images

    width = sum(image.width for image in images) + PADDING * (len(images) - 1)
    canvas = Images.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + PADDING
    return canvas


def wrap(text: str, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels; keep its line breaks; cut words wider than a line."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if line and font().getlength(joined) > width:
                lines.append(line)
                joined = word
            while len(joined) > 1 and font().getlength(joined) > width:
                fits = next(n for n in range(len(joined) - 1, 0, -1) if n == 1 or font().getlength(joined[:n]) <= width)
                lines.append(joined[:fits])
                joined = joined[fits:]
            line = joined
        lines.append(line)
    return lines


@cache
def font() -> FreeTypeFont:
    """Return DejaVu Sans from matplotlib's files: it has accents and symbols that Pillow's default font lacks."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", TEXT_PIXELS)


def _on_white(image: Image) -> Image:
    from PIL import Image as Images

    picture = image.convert("RGBA")
    return Images.alpha_composite(Images.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _corners(box: Box, scale: int, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Return the first and last pixel (inclusive) of `box` on a canvas of `size`; None if nothing is to draw."""
    if not all(map(math.isfinite, box)):
        return None
    x, y, width, height = (value * scale for value in box)
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(size[0], round(x + width)) - 1, min(size[1], round(y + height)) - 1
    return (left, top, right, bottom) if right >= left and bottom >= top else None


def _tag(
    draw: ImageDraw, corners: tuple[int, int, int, int] | None, label: str, colour: str, size: tuple[int, int]
) -> None:
    """Draw the label in its box's colour: above the box if there is room, else below, else in the corner."""
    from PIL import ImageColor

    left, top, _, bottom = corners or (0, 0, 0, 0)
    width = math.ceil(font().getlength(label)) + 4
    x = max(0, min(left, size[0] - width))
    y = top - LINE_PIXELS if top >= LINE_PIXELS else bottom + 1
    y = max(0, min(y, size[1] - LINE_PIXELS))
    red, green, blue = ImageColor.getrgb(colour)[:3]
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
    draw.rectangle((x, y, x + width - 1, y + LINE_PIXELS - 1), fill=colour)
    draw.text((x + 2, y), label, ink, font())
