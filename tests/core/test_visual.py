"""Pictures of boxes and captions, checked on their pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from petlbench.core.drawing import MIN_CELL_PIXELS, contact_sheet, draw_boxes, font, wrap

RED = (255, 0, 0)


def extent(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """x, y, width, height of the pixels of one colour."""
    ys, xs = np.nonzero((np.asarray(image) == colour).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)


@pytest.mark.parametrize("scale", [1, 3])
def test_an_outline_covers_exactly_its_box_at_every_scale(scale: int) -> None:
    image = Image.new("RGB", (100, 60), "white")
    drawn = draw_boxes(image, [((10.0, 20.0, 30.0, 15.0), "", "red")], scale)
    assert drawn.size == (100 * scale, 60 * scale)
    assert extent(drawn, RED) == (10 * scale, 20 * scale, 30 * scale, 15 * scale)
    assert drawn.getpixel((25 * scale, 27 * scale)) == (255, 255, 255), "the inside stays visible"
    assert image.getcolors() == [(6000, (255, 255, 255))], "the image itself is left alone"


def test_a_box_that_reaches_outside_is_clipped() -> None:
    drawn = draw_boxes(Image.new("RGB", (40, 40), "white"), [((-5.0, 30.0, 100.0, 100.0), "", "red")])
    assert extent(drawn, RED) == (0, 30, 40, 10)
    assert drawn.getpixel((0, 35)) == drawn.getpixel((39, 35)) == drawn.getpixel((20, 39)) == RED, "all four edges show"


@pytest.mark.parametrize("box", [(float("nan"), 0, 5, 5), (5, 5, -3, 4), (5, 5, 0, 0), (90, 90, 5, 5)])
def test_a_box_without_area_in_the_image_leaves_no_outline(box: tuple[float, ...]) -> None:
    image = Image.new("RGB", (40, 40), "white")
    assert draw_boxes(image, [(box, "", "red")]).tobytes() == image.tobytes()
    assert draw_boxes(image, [(box, "predicted", "red")]).tobytes() != image.tobytes(), "its label still shows"


@pytest.mark.parametrize("top", [0, 40, 80])
def test_a_label_stays_inside_the_image_and_outside_its_box(top: int) -> None:
    drawn = draw_boxes(Image.new("RGB", (120, 100), "white"), [((90.0, float(top), 20.0, 20.0), "a label", "red")])
    inside = np.asarray(drawn)[top + 1 : top + 19, 91:109]
    assert (inside == 255).all()
    width = extent(drawn, RED)[2]
    assert width > font().getlength("a label") > 20


def test_transparent_images_are_drawn_on_white() -> None:
    assert draw_boxes(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), []).getpixel((0, 0)) == (255, 255, 255)


def test_captions_wrap_to_the_width_and_lose_no_letter() -> None:
    text = "There is a box with a black item between 2 items\n" + "x" * 90
    lines = wrap(text, 160)
    assert len(lines) > 4
    assert all(font().getlength(line) <= 160 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_a_sheet_places_images_in_rows_and_writes_captions_below_them() -> None:
    tiles = [Image.new("RGB", (200, 50), colour) for colour in ("red", "lime", "blue")]
    sheet = contact_sheet(tiles, ["one", "two " * 40, ""], columns=2)
    red, lime, blue = (extent(sheet, c) for c in (RED, (0, 255, 0), (0, 0, 255)))
    assert red[2:] == lime[2:] == blue[2:] == (200, 50)
    assert red[1] == lime[1] and lime[0] >= red[0] + 200, "side by side"
    assert blue[0] == red[0], "a new row starts at the left"
    wrapped = np.asarray(sheet)[lime[1] + 50 : blue[1]]
    dark = (wrapped < 100).all(-1)
    assert dark[:, lime[0] : lime[0] + 200].sum() > dark[:, red[0] : red[0] + 200].sum() > 0
    assert not dark[-4:].any(), "the text ends above the next row"


def test_a_sheet_of_one_small_image_leaves_room_for_its_caption() -> None:
    assert contact_sheet([Image.new("L", (8, 8))], ["a caption"], columns=5).width > MIN_CELL_PIXELS


@pytest.mark.parametrize(("images", "captions", "columns"), [(0, 0, 1), (1, 2, 1), (1, 1, 0)])
def test_a_sheet_that_cannot_be_is_refused(images: int, captions: int, columns: int) -> None:
    with pytest.raises(ValueError, match="make no contact sheet"):
        contact_sheet([Image.new("L", (8, 8))] * images, [""] * captions, columns)
