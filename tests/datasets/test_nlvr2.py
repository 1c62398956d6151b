"""Tests of NLVR2 on a miniature in the official layout: rows, the order of pairs, and refused files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from petlbench.api.schemas import PAIRS
from petlbench.core.errors import UserError
from petlbench.datasets.files.declaration import FilesConfig
from petlbench.datasets.official.nlvr2 import NLVR2
from petlbench.results.store import Store
from tests.miniatures import one_epoch, picture

PAIRS_OF = {"train": 4, "dev": 2, "test1": 2}  # two statements each
LEFT, RIGHT = (64, 48), (40, 50)


def line(identifier: str, label: str = "True", **more: Any) -> dict[str, Any]:
    return {
        "sentence": f"the left image of {identifier} has a dog",
        "left_url": "https://example.org/a.png",
        "right_url": "https://example.org/b.png",
        "label": label,
        "identifier": identifier,
        "validation": {"1": label},
        **more,
    }


def miniature(root: Path, *, flat: bool = False) -> Path:
    """Write the repository's data and image folders, as its README describes, or all training images in one folder."""
    (root / "nlvr2" / "data").mkdir(parents=True)
    for part, count in PAIRS_OF.items():
        lines = []
        for pair in range(count):
            folder = {"directory": pair % 2} if part == "train" else {}
            lines += [line(f"{part}-{pair}-0-{i}", ("True", "False")[i], **folder) for i in range(2)]
            base = "images/train" if part == "train" else part
            below = f"{base}/{pair % 2}" if part == "train" and not flat else base
            for side, size in enumerate((LEFT, RIGHT)):
                picture(root / "nlvr2" / below / f"{part}-{pair}-0-img{side}.png", size, seed=2 * pair + side)
        (root / "nlvr2" / "data" / f"{part}.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return miniature(tmp_path / "data")


def source(root: Path, **options: Any) -> NLVR2:
    return NLVR2(FilesConfig(**options), root)


def test_statements_come_with_their_two_images_in_order(root: Path) -> None:
    found = source(root)
    found.check()
    assert found.parts("pairs") == ("train", "dev", "test1")
    for split, part in {"train": "train", "validation": "dev", "test": "test1"}.items():
        rows = found.load("pairs", split)
        assert rows.features.keys() == PAIRS.keys() and len(rows) == 2 * PAIRS_OF[part]
        assert rows["sample_id"][:2] == [f"{part}-0-0-0", f"{part}-0-0-1"]
        assert (rows[0]["answers"], rows[1]["answers"]) == (["true"], ["false"])
        assert rows[0]["image_id"] == f"{part}-0-0" and rows[0]["answer_type"] == "true/false"
        assert rows[2]["question"] == f"the left image of {part}-1-0-0 has a dog"
        assert (rows[0]["image"].size, rows[0]["image_2"].size) == (LEFT, RIGHT)


@pytest.mark.parametrize("where", ["", "nlvr2"])
@pytest.mark.parametrize("flat", [False, True])
def test_training_images_are_found_in_numbered_folders_and_in_one(tmp_path: Path, flat: bool, where: str) -> None:
    found = source(miniature(tmp_path / "data", flat=flat) / where)
    images = found.load("pairs", "train").with_format("arrow")[:]["image"].combine_chunks().field("path").to_pylist()
    assert all(Path(image).is_file() for image in images)
    assert {Path(image).parent.name for image in images} == ({"train"} if flat else {"0", "1"})


def test_a_second_image_that_is_missing_or_broken_is_reported_or_left_out(root: Path) -> None:
    (root / "nlvr2" / "test1" / "test1-0-0-img1.png").unlink()
    broken = root / "nlvr2" / "test1" / "test1-1-0-img1.png"
    with pytest.raises(UserError, match=r"1 images of nlvr2, test, .*test1-0-0-img1.png \(missing\)"):
        source(root).load("pairs", "test")
    found = source(root, skip_broken=True)
    assert found.load("pairs", "test")["image_id"][:] == ["test1-1-0"] * 2 and "test1-0-0-img1.png" in found.notes()[0]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match="none is left"):
        source(root, skip_broken=True).load("pairs", "test")


def test_a_picture_too_large_is_refused_when_it_is_opened(root: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(root / "nlvr2" / "dev" / "dev-0-0-img0.png")
    rows = source(root).load("pairs", "validation")
    with pytest.raises(UserError, match=r"dev-0-0-img0.png cannot be used \(10000 x 10000 pixels"):
        rows[0]
    assert len(source(root, skip_broken=True).load("pairs", "validation")) == 2


def test_an_empty_sentence_is_left_out_and_counted(root: Path) -> None:
    path = root / "nlvr2" / "data" / "dev.json"
    path.write_text("\n".join(json.dumps(line(f"dev-0-0-{i}", sentence=["A dog.", " "][i])) for i in range(2)))
    found = source(root)
    assert found.load("pairs", "validation")["sample_id"][:] == ["dev-0-0-0"]
    assert found.notes() == ("nlvr2 dev: left out 1 (empty sentence), first dev-0-0-1",)


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[:-20], r"dev.json, line 4 is truncated or malformed"),
    "no JSON": (lambda text: "<html>", r"dev.json, line 1 is truncated or malformed"),
    "no label": (lambda text: text.replace('"label"', '"lable"'), r"line 1 .*label: Field required"),
    "another label": (lambda text: text.replace('"label": "False"', '"label": "Maybe"'), r"line 2 .*label: Input"),
    "another part's": (lambda text: text.replace("dev-0-0-1", "../../etc/passwd-0"), r"line 2 .*identifier: String"),
    "hostile folder": (
        lambda text: text.replace('"sentence"', '"directory": "../../etc", "sentence"', 1),
        r"dev.json names the image 'dev/../../etc'.*do not trust it",
    ),
    "twice": (lambda text: text.replace("dev-0-0-1", "dev-0-0-0"), r"dev.json has identifier dev-0-0-0 twice"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(root: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    path = root / "nlvr2" / "data" / "dev.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        source(root).load("pairs", "validation")
    assert "\n" not in str(caught.value)
    assert len(source(root).load("pairs", "test")) == 4, "another part is not touched"


def test_what_is_not_there_is_named_with_where_to_get_it(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nlvr2 is not there: looked below .*test1.*github.com/lil-lab/nlvr"):
        source(tmp_path).check()
    with pytest.raises(UserError, match=r"the data root .*nowhere does not exist"):
        source(tmp_path / "nowhere").check()
    with pytest.raises(UserError, match=r"nlvr2 has no split 'test2'.*test1"):
        source(root).load("pairs", "test2")
    (root / "nlvr2" / "data" / "dev.json").unlink()
    with pytest.raises(UserError, match=r"nlvr2 \(official\) has no part 'dev'"):
        source(root).check()


@pytest.mark.parametrize(
    "backbone", ["tiny", "vl_bart:tiny"]
)  # with the suite's image order, and with the backbone's own
def test_a_miniature_trains_and_is_scored(root: Path, tmp_path: Path, backbone: str) -> None:
    record = one_epoch("pairs", "nlvr2", root, tmp_path / "out", rows=8, backbone=backbone)
    assert record.outcome == "ok", record.reason
    assert record.metrics.keys() == {"accuracy"} and 0 <= record.metrics["accuracy"] <= 1
    samples = Store(tmp_path / "out").samples(record)
    assert samples is not None and len(samples["sample_ids"]) == 4 and set(samples["predictions"]) <= {"true", "false"}
