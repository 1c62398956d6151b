"""`petlbench data check` and `petlbench data show` as typed: exit statuses, one-line errors, pictures."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petlbench.api.registries import DATASETS
from petlbench.commands import main
from petlbench.core.drawing import fitted
from petlbench.describe import samples
from tests.toy_dataset import Toy, make

NLVR = str(Path(__file__).parents[1] / "fixtures" / "nlvr")
SMALL = json.dumps({"train_scenes": 12, "validation_scenes": 6, "test_scenes": 6})
LIME = (0, 255, 0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PETLBENCH_DATA", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with the toy data set, which is registered."""
    known = DATASETS.get
    monkeypatch.setattr(DATASETS, "get", lambda name: Toy if name == "toy" else known(name))
    make(tmp_path / "data")
    return tmp_path / "data"


def row(image: Image.Image, **columns: Any) -> dict[str, Any]:
    return {"sample_id": "sample-1", "image_id": "1", "image": image, **columns}


def extent(image: Image.Image) -> tuple[int, int, int, int]:
    """Return x, y, width and height of the box around all lime pixels."""
    ys, xs = np.nonzero((np.asarray(image) == LIME).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)


@pytest.mark.parametrize(
    ("size", "shown", "box"),
    [
        ((2000, 1000), (320, 160), (80, 32, 40, 48)),
        ((1000, 2000), (160, 320), (80, 32, 40, 48)),
        ((320, 200), (320, 200), (80, 32, 40, 48)),
        ((50, 40), (300, 240), (84, 30, 42, 48)),
        ((30000, 20), (320, 1), (80, 0, 40, 1)),
    ],
)
def test_a_box_follows_its_image_to_the_size_of_the_sheet(
    size: tuple[int, int], shown: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    across, down = shown[0] / size[0], shown[1] / size[1]
    stored = [box[0] / across, box[1] / down, box[2] / across, box[3] / down]
    drawn = samples.picture(row(Image.new("RGB", size, "navy"), box=stored))
    assert drawn.size == shown
    assert extent(drawn) == box


def test_two_images_stand_side_by_side_in_their_order() -> None:
    pair = row(Image.new("RGB", (640, 320), "red"), image_2=Image.new("RGB", (320, 320), "blue"))
    drawn = samples.picture(pair)
    assert drawn.height == 320
    assert drawn.width > 2 * 320
    assert drawn.getpixel((0, 0)) == (255, 0, 0)
    assert drawn.getpixel((drawn.width - 1, 319)) == (0, 0, 255)
    assert drawn.getpixel((0, 319)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F", "YCbCr"])
@pytest.mark.parametrize("side", [8, 700])
def test_pictures_of_every_mode_are_shown(mode: str, side: int) -> None:
    drawn, scale = fitted(Image.new(mode, (side, side)), 320)
    assert (drawn.mode, drawn.size, scale) == ("RGB", (320, 320), (320 / side, 320 / side))


def test_pictures_with_a_palette_are_scaled_down_as_smoothly_as_others() -> None:
    stripes = Image.fromarray((np.indices((640, 640))[1] % 2 * 255).astype(np.uint8)).convert("P")
    assert fitted(stripes, 320)[0].getextrema() == ((128, 128),) * 3


def test_answers_are_counted_and_hidden_ones_said_to_be() -> None:
    image = Image.new("RGB", (8, 8))
    asked = row(image, question="is it red?", answers=["no", "yes", "yes"], answer_type="yes/no")
    assert samples.text(asked).splitlines() == ["sample-1", "is it red?", "→ yes ×2, no"]
    assert samples.text({**asked, "answers": []}).splitlines()[-1] == "→ (its answers are not public)"


def test_every_caption_has_a_line_of_its_own_and_endless_texts_end() -> None:
    captioned = row(Image.new("RGB", (8, 8)), captions=["one\nline", "two"])
    assert samples.text(captioned).splitlines() == ["sample-1", "• one line", "• two"]
    endless = samples.text({**captioned, "captions": ["x" * 1_000_000] * 5})
    assert endless.endswith("…")
    assert len(endless) == samples.MAX_CHARACTERS + 1


def test_letters_that_no_font_has_are_drawn_all_the_same(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "val.json"
    found = json.loads(path.read_text())
    texts = ["猫が\U0001f600\U000e0001 è ﷽", "\x00\x07\x1b[31m", "שלום", "\u202eabc\u2028def", "", "   "]
    path.write_text(json.dumps([[name, text, box] for (name, _, box), text in zip(found, texts, strict=True)]))
    assert main.main(["data", "show", "rec:toy", "--split", "val", "--data-root", str(root)]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def shown(*arguments: str) -> bytes:
    assert main.main(["data", "show", *arguments]) == 0
    return Path("pictures/rec_toy_train.png").read_bytes()


def test_the_seed_draws_the_samples(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rec:toy", "--data-root", str(root), "--count", "3"]
    first = shown(*arguments)
    assert capsys.readouterr().out == "pictures/rec_toy_train.png\n"
    assert shown(*arguments) == first
    assert shown(*arguments, "--seed", "1") != first
    with Image.open("pictures/rec_toy_train.png") as sheet:
        assert sheet.width == 8 + 3 * (320 + 8)
    assert [path.name for path in Path("pictures").iterdir()] == ["rec_toy_train.png"]


@pytest.mark.parametrize("name", ["rec:digits", "vqa:shapes", "captioning:digits", "retrieval", "vqa:nlvr", "rec:nlvr"])
def test_sources_without_official_parts_are_shown_and_checked(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data-root", NLVR] if name.endswith("nlvr") else ["--config", SMALL]
    out = tmp_path / "new" / "sheet.png"
    assert main.main(["data", "show", name, "--split", "test", "--out", str(out), *options]) == 0
    with Image.open(out) as sheet:
        assert (extent(sheet.convert("RGB"))[2] > 0) if name.startswith("rec") else sheet.width > 320
    assert main.main(["data", "check", name, "--json", *options]) == 0
    (found,) = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert [entry["name"] for entry in found["entries"]] == ["train", "validation", "test"]
    assert all(entry["opened"] == min(16, entry["counts"]["images"]) for entry in found["entries"])


def test_an_official_part_is_shown(root: Path) -> None:
    assert main.main(["data", "show", "rec:toy", "--split", "testA", "--data-root", str(root)]) == 0
    assert Path("pictures/rec_toy_testA.png").is_file()


def test_several_data_sets_are_checked_and_one_that_fails_is_enough(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "nlvr").symlink_to(NLVR)
    (root / "val.json").write_text("")
    assert main.main(["data", "check", "vqa:nlvr", "rec:toy", "rec:toy", "--json", "--data-root", str(root)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(one["task"], one["ok"]) for one in found] == [("vqa", True), ("rec", False)]


def test_json_says_all_that_the_table_says(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "pictures" / "val" / "00.png").write_bytes(b"no image")
    assert main.main(["data", "check", "rec:toy", "--json", "--sample", "1", "--all", "--data-root", str(root)]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    val = next(entry for entry in found["entries"] if entry["name"] == "val")
    assert (val["counts"], val["published"]) == ({"images": 6, "expressions": 6}, {"images": 6, "expressions": 6})
    assert (val["ok"], val["verdict"], val["opened"]) == (False, "missing or broken images: 1", 6)
    assert list(val["faults"]) == [str(root / "pictures" / "val" / "00.png")]
    assert (found["ok"], found["origin"]) == (False, "get it from the moon")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data"], "the following arguments are required: check|show"),
        (["data", "chek"], "argument check|show: invalid choice: 'chek'"),
        (["data", "check"], "the following arguments are required: TASK:DATASET"),
        (["data", "check", "rce:digits"], "unknown task 'rce': did you mean 'rec'?"),
        (["data", "check", "rec:dgits"], "unknown data set 'dgits': did you mean 'digits'?"),
        (["data", "check", "rec:toy", "--sample", "-1"], "argument --sample: "),
        (["data", "check", "rec:toy", "--data-root", "nowhere"], "the data root nowhere does not exist: fix"),
        (["data", "check", "vqa:toy"], "data set 'toy' does not serve task 'vqa', only captioning, pairs, rec"),
        (["data", "check", "rec:toy", "--config", "{"], "--config is not JSON"),
        (["data", "check", "rec:toy", "--config", "[" * 100_000], "--config is not JSON"),
        (["data", "check", "rec:toy", "--config", "[]"], "--config must be a JSON object such as "),
        (
            ["data", "check", "rec:toy", "--config", '{"layuot": "x"}'],
            "--config for toy: layuot: unknown key: did you mean 'layout'?",
        ),
        (
            ["data", "check", "rec:toy", "--config", '{"layout": "toi"}'],
            "toy has no layout 'toi': did you mean 'toy'?",
        ),
        (
            ["data", "show", "rec:toy", "--split", "tsetA"],
            "there is no split 'tsetA' for rec: did you mean 'testA'? there are train, validation, test, extra, testA,",
        ),
        (
            ["data", "show", "rec:digits", "--split", "validaton"],
            "there is no split 'validaton' for rec: did you mean 'validation'? there are train, validation, test",
        ),
        (
            ["data", "show", "rec:nlvr", "--split", "dev", "--data-root", NLVR],
            "there is no split 'dev' for rec: there are train",
        ),
        (["data", "show", "rec:nlvr"], "nlvr needs its files"),
        (["data", "show", "rec:toy", "--count", "0"], "argument --count: a positive whole number is needed, not '0'"),
        (["data", "show", "rec:toy", "--count", "401"], "--count 401: a sheet holds at most 400 samples"),
        (["data", "show", "rec:toy", "--out", "sheet.jpg"], "--out sheet.jpg: a contact sheet is a PNG file"),
        (["data", "show", "rec:toy", "--out", "/dev/null/sheet.png"], "cannot write to folder /dev/null"),
        (["data", "show", "rec:toy", "--seed", "x"], "argument --seed: a whole number is needed, not 'x'"),
    ],
)
def test_mistakes_exit_with_2_in_one_line_and_leave_nothing(
    arguments: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_root = [*arguments, "--data-root", str(root)] if "rec:toy" in arguments else arguments
    assert main.main(arguments if "--data-root" in arguments else with_root) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"petlbench: error: {message}")
    assert error.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []


def test_a_sheet_that_cannot_be_written_leaves_the_old_one(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sheet.png"
    folder.mkdir()
    arguments = ["data", "show", "rec:toy", "--data-root", str(root), "--out"]
    assert main.main([*arguments, str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"petlbench: error: cannot write {folder}")
    assert list(folder.iterdir()) == []
    old = tmp_path / "kept" / "sheet.png"
    old.parent.mkdir()
    old.write_bytes(b"old")
    old.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(old.parent, os.W_OK):  # root may write anywhere
        assert main.main([*arguments, str(old)]) == 0
    else:
        assert main.main([*arguments, str(old)]) == 2
        assert old.read_bytes() == b"old"
    old.parent.chmod(stat.S_IRWXU)


def test_an_image_that_cannot_be_shown_is_named_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "pictures" / "val" / "02.png"
    path.write_bytes(path.read_bytes()[:60])
    arguments = ["data", "show", "rec:toy", "--split", "val", "--data-root", str(root)]
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"petlbench: error: {path} cannot be used")
    assert error.count("\n") == 1
    assert not Path("pictures").exists()
    assert main.main([*arguments, "--config", '{"skip_broken": true}']) == 0
