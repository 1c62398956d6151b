"""TransVG's augmentation: its random values, and that a box frames the same thing before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from petlbench.tasks import rec_augmentation
from petlbench.tasks.rec_augmentation import LONG_SIDES, transvg, transvg_released
from PIL import Image

from petlbench.api.task import Row
from petlbench.api.tokens import Placement

Augmentation = Callable[[Row, np.random.Generator], Row]
BOTH = pytest.mark.parametrize("augment", [transvg, transvg_released])
BOX = [61.0, 33.0, 42.0, 27.0]


def row(size: tuple[int, int] = (160, 120), box: list[float] = BOX, text: str = "the dog", **columns: Any) -> Row:
    """Return a row with a red target on grey noise, which stays grey under every change of colour."""
    noise = np.random.default_rng(0).integers(60, 200, (size[1], size[0], 1), dtype=np.uint8).repeat(3, axis=2)
    x, y, width, height = map(int, box)
    noise[y : y + height, x : x + width] = (230, 60, 60)
    return {"sample_id": "s", "image": Image.fromarray(noise), "expression": text, "box": box, **columns}


def framed(image: Image.Image) -> list[float]:
    """Return the box (x, y, width, height) around the red pixels."""
    pixels = np.asarray(image, dtype=int)
    y, x = np.nonzero(pixels[..., 0] - pixels[..., 1] > 30)
    return [float(x.min()), float(y.min()), float(np.ptp(x) + 1), float(np.ptp(y) + 1)]


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def changed(augment: Augmentation, given: Row, draws: int) -> list[Row]:
    return [augment(given, rng(i)) for i in range(draws)]


@BOTH
def test_the_same_generator_gives_the_same_row(augment: Augmentation) -> None:
    for given in (row(), row(text="left one")):
        first, again = augment(given, rng(3)), augment(given, rng(3))
        assert first["image"].tobytes() == again["image"].tobytes()
        assert {k: v for k, v in first.items() if k != "image"} == {k: v for k, v in again.items() if k != "image"}


def test_a_row_is_given_back_whole_and_the_old_one_is_left_as_it_was() -> None:
    given = row(image_id="i", subset="testA")
    before = given["image"].tobytes(), list(given["box"])
    for found in changed(transvg, given, 10):
        assert found.keys() == {*given, "placement"}
        assert (found["sample_id"], found["image_id"], found["subset"]) == ("s", "i", "testA")
    assert (given["image"].tobytes(), given["box"]) == before


@pytest.mark.parametrize("size", [(160, 120), (100, 300), (640, 480), (90, 75)])
def test_the_box_frames_the_same_thing_in_every_cut_and_mirror_image(size: tuple[int, int]) -> None:
    box = [float(round(share * size[i % 2])) for i, share in enumerate((0.35, 0.4, 0.3, 0.25))]
    cut = 0
    for found in changed(transvg, row(size, box), 80):
        assert found["box"] == framed(found["image"])
        cut += found["image"].size != size
    assert cut > 20


def test_boxes_keep_fractions_of_a_pixel_and_lie_within_the_image_with_an_area() -> None:
    generator = rng(0)
    for i in range(1500):
        size = tuple(int(n) for n in generator.integers(2, 200, 2))
        corner = generator.uniform(0, size)
        x, y, width, height = box = [*corner, *generator.uniform(0, size - corner)]
        found = transvg(
            {"image": Image.new("RGB", size), "expression": "a dog", "box": [float(n) for n in box]}, rng(i)
        )
        left, top, w, h = found["box"]
        assert np.isfinite(found["box"]).all() and w > 0 and h > 0
        assert left >= -1e-9 and top >= -1e-9
        assert left + w <= found["image"].width + 1e-9 and top + h <= found["image"].height + 1e-9
        if found["image"].size == size:
            assert [w, h] == pytest.approx([width, height]) and top == pytest.approx(y)
            assert left == pytest.approx(x) or left == pytest.approx(size[0] - x - width)


def test_a_cut_keeps_the_middle_of_the_target() -> None:
    """A target at the edge, which most cuts would miss, keeps at least half of each length."""
    box = [148.0, 108.0, 12.0, 12.0]
    for found in changed(transvg, row((160, 120), box), 200):
        assert found["box"][2] >= 6 and found["box"][3] >= 6
        assert found["box"] == framed(found["image"])


def test_a_target_that_no_cut_can_keep_leaves_the_image_whole() -> None:
    outside = row(box=[150.0, 40.0, 30.0, 10.0])  # its centre is beyond the right edge
    assert {found["image"].size for found in changed(transvg, outside, 40)} == {(160, 120)}


@BOTH
def test_cuts_are_as_large_as_the_release_draws_them(augment: Augmentation) -> None:
    """Half of the rows are cut, to 384 to 600 pixels of an image enlarged to a short side of 400, 500 or 600."""
    sizes = [found["image"].size for found in changed(augment, row((200, 100), [90.0, 40.0, 20.0, 20.0]), 800)]
    cuts = np.array([size for size in sizes if size != (200, 100)])
    assert 0.44 < len(cuts) / len(sizes) < 0.54  # a few in a hundred keep every pixel, or find no cut
    assert cuts[:, 0].min() == 64 and cuts[:, 0].max() == 150  # 384 of 600 / 100, and 600 of 400 / 100
    assert cuts[:, 1].min() == 64 and cuts[:, 1].max() == 100


@BOTH
def test_a_text_that_speaks_of_places_is_never_cut(augment: Augmentation) -> None:
    for word in ("left", "Right", "top", "bottom", "middle", "leftmost", "right-hand", "topmost"):
        sizes = {found["image"].size for found in changed(augment, row(text=f"the {word} dog"), 20)}
        assert sizes == {(160, 120)}, word


@pytest.mark.parametrize("text", ["the stop sign", "bright laptop", "an upright man", "bottomless pit"])
def test_words_that_only_contain_a_place_stop_the_cut_of_the_release_alone(text: str) -> None:
    whole = {
        augment: {found["image"].size for found in changed(augment, row(text=text), 20)} == {(160, 120)}
        for augment in (transvg, transvg_released)
    }
    assert whole == {transvg: False, transvg_released: True}


def mirrored(augment: Augmentation, text: str) -> str:
    """Return the text of a mirrored image; check that the text of an unmirrored one stays."""
    given = row(text=text)
    found = {}
    for made in changed(augment, given, 30):
        if made["image"].size == (160, 120):
            found.setdefault(abs(made["box"][0] - BOX[0]) > 1, set()).add(made["expression"])
    assert found[False] == {text if augment is transvg else text.lower()}
    assert len(found[True]) == 1
    return str(found[True].pop())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dog left of the right cat", "dog right of the left cat"),
        ("Left one, RIGHTMOST", "Right one, LEFTMOST"),
        ("left-hand side, 2nd from the right.", "right-hand side, 2nd from the left."),
        ("bright, upright, leftover, copyright", "bright, upright, leftover, copyright"),
        ("top of the middle", "top of the middle"),
        ("a man", "a man"),
    ],
)
def test_words_of_place_are_mirrored_with_the_image_and_nothing_else(text: str, expected: str) -> None:
    assert mirrored(transvg, text) == expected


def test_the_release_mirrors_parts_of_words_in_lower_case() -> None:
    assert mirrored(transvg_released, "Bright leftover Right of left") == "bleft rightover left of right"


def test_half_of_all_rows_are_mirrored() -> None:
    count = sum(found["box"][0] != BOX[0] for found in changed(transvg, row(text="left"), 400))
    assert 160 < count < 240


@BOTH
def test_four_of_five_rows_change_their_colours_and_no_pixel_moves(augment: Augmentation) -> None:
    given = row(text="left")
    before, changes, brightest = np.asarray(given["image"], dtype=float), 0, []
    for found in changed(augment, given, 300):
        after = np.asarray(found["image"], dtype=float)
        after = after if found["box"] == BOX else after[:, ::-1]
        changes += not np.array_equal(before, after)
        brightest.append(after.mean() / before.mean())
        grey = (before[..., 0] == before[..., 1]) & (before[..., 0] > 0)
        assert np.ptp(after[grey], axis=-1).max() <= 1 and np.corrcoef(before[grey].T, after[grey].T)[0, 3] > 0.97
    assert 210 < changes < 265
    assert 0.58 < min(brightest) < 0.68 and 1.15 < max(brightest) < 1.42


def test_brightness_contrast_and_saturation_change_by_four_tenths_at_most_in_any_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factors: dict[str, list[float]] = {name: [] for name in ("Brightness", "Contrast", "Color")}
    orders: Counter[tuple[str, ...]] = Counter()
    for name in factors:
        monkeypatch.setattr(rec_augmentation, name, lambda image, name=name: Recorder(image, name, factors, calls))
    for i in range(300):
        calls: list[str] = []
        transvg(row(size=(8, 8), box=[2.0, 2.0, 3.0, 3.0]), rng(i))
        orders[tuple(calls)] += 1
    for values in factors.values():
        assert 0.6 <= min(values) < 0.62 and 1.38 < max(values) <= 1.4
    assert 35 < orders.pop(()) < 90  # one in five
    assert len(orders) == 6 and min(orders.values()) > 15


class Recorder:
    """Replaces a change of colour and records its factor."""

    def __init__(self, image: Image.Image, name: str, factors: dict[str, list[float]], calls: list[str]) -> None:
        self.image, self.values, self.calls, self.name = image, factors[name], calls, name

    def enhance(self, factor: float) -> Image.Image:
        self.values.append(factor)
        self.calls.append(self.name)
        return self.image


@BOTH
def test_every_size_and_every_place_on_the_canvas_is_drawn(augment: Augmentation) -> None:
    placements = [found["placement"] for found in changed(augment, row((8, 6), [2.0, 2.0, 3.0, 3.0]), 700)]
    assert Counter(640 * p.long_side for p in placements).keys() == {float(side) for side in LONG_SIDES}
    assert list(LONG_SIDES) == [448, 480, 512, 544, 576, 608, 640]
    assert min(Counter(p.long_side for p in placements).values()) > 60
    for shares in ([p.across for p in placements], [p.down for p in placements]):
        assert np.histogram(shares, bins=4, range=(0, 1))[0].min() > 130
    assert abs(np.corrcoef([p.across for p in placements], [p.down for p in placements])[0, 1]) < 0.15


def test_a_placement_reaches_every_pixel_alike_and_the_middle_is_rounded_to_the_upper_left() -> None:
    shares = (np.arange(4000) + 0.5) / 4000
    found = Counter(Placement(across=share).corner((61, 64), 64)[0] for share in shares)
    assert found == {0: 1000, 1: 1000, 2: 1000, 3: 1000}
    assert [Placement().corner((length, 64 - length), 64)[0] for length in (64, 63, 62, 61, 1)] == [0, 0, 1, 1, 31]
    for share in (0.0, 1.0):
        assert Placement(across=share, down=1 - share).corner((60, 50), 64) == (4 * share, 14 * (1 - share))


@pytest.mark.parametrize(
    ("centre", "cut", "right", "released"),
    [
        ((50, 50), (10, 10, 90, 90), True, True),
        ((80, 10), (0, 0, 50, 50), False, True),  # the release ignores the right edge
        ((10, 80), (0, 0, 50, 50), False, True),  # and the lower one
        ((10, 80), (5, 40, 60, 100), True, False),  # x against the upper edge
        ((80, 10), (40, 5, 100, 60), True, False),  # y against the left edge
        ((50, 50), (60, 0, 90, 90), False, False),
        ((50, 50), (0, 60, 90, 90), False, False),
        ((50, 50), (50, 10, 90, 90), False, False),  # an edge is not inside
        ((50, 50), (10, 50, 90, 90), False, False),
        ((50, 50), (10, 10, 50, 90), False, True),
        ((50, 50), (10, 10, 90, 50), False, True),
    ],
)
def test_a_cut_is_allowed_by_the_centre_and_in_the_release_by_the_wrong_edges(
    centre: tuple[int, int], cut: rec_augmentation.Cut, right: bool, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rec_augmentation, "_drawn", lambda *given: cut)
    given = row((100, 100), [centre[0] - 6.0, centre[1] - 4.0, 12.0, 8.0])
    for augment, allowed in ((transvg, right), (transvg_released, released)):
        sizes = {found["image"].size for found in changed(augment, given, 12)}
        assert sizes == ({(100, 100), (cut[2] - cut[0], cut[3] - cut[1])} if allowed else {(100, 100)})


def test_the_release_may_cut_a_box_to_nothing() -> None:
    given = row((400, 100), [380.0, 8.0, 12.0, 6.0])
    cut = [found for found in changed(transvg_released, given, 300) if found["image"].width < 380]
    assert len(cut) > 20
    for found in cut:  # the box is at the edge that it crosses; mirroring makes it the left one
        assert found["box"][2] == 0 and found["box"][0] in (0, found["image"].width)


def test_boxes_of_the_release_are_whole_pixels() -> None:
    for found in changed(transvg_released, row(box=[61.9, 33.9, 42.9, 27.9], text="left"), 12):
        x, *rest = found["box"]
        assert x in (61.0, 160 - 61 - 42) and rest == [33.0, 42.0, 27.0]


@BOTH
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_any_mode_become_colour_images(augment: Augmentation, mode: str) -> None:
    given = row()
    for found in changed(augment, {**given, "image": given["image"].convert(mode)}, 4):
        assert found["image"].mode == "RGB"


@BOTH
def test_the_smallest_images_keep_a_pixel(augment: Augmentation) -> None:
    for size, box in (((9, 1), [4.0, 0.0, 2.0, 1.0]), ((1, 9), [0.0, 4.0, 1.0, 2.0]), ((1, 1), [0.0, 0.0, 1.0, 1.0])):
        for found in changed(augment, {"image": Image.new("RGB", size), "expression": "a", "box": box}, 200):
            assert min(found["image"].size) == 1
