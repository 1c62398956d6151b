"""NLVR on a miniature of the corpus in the official layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petlbench.api.registries import TASKS
from petlbench.core.errors import UserError
from petlbench.datasets.files import images
from petlbench.datasets.official.nlvr import NLVR, NLVRConfig

MINIATURE = Path(__file__).parents[1] / "fixtures" / "nlvr"
PAINT = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
BACKGROUND = (211, 211, 211)


def source(root: Path | None = MINIATURE, **options: bool) -> NLVR:
    return NLVR(NLVRConfig(**options), root)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINIATURE, tmp_path / "nlvr"))


def an_image(root: Path, part: str) -> Path:
    return sorted(root.glob(f"{part}/images/*/*.png"))[0]


@pytest.mark.parametrize("task", sorted(NLVR.tasks))
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_task_and_split_has_rows_of_its_schema_with_images_that_decode(task: str, split: str) -> None:
    rows = source().load(task, split)
    assert rows.features == TASKS.get(task).features
    assert len(set(rows["sample_id"])) == len(rows) > 0
    assert rows[0]["image"].size == (400, 100)


def test_vqa_keeps_the_official_sentence_and_label() -> None:
    lines = (MINIATURE / "hidden" / "hidden.json").read_text().splitlines()
    official = {f"hidden-{a['identifier']}": (a["sentence"], [a["label"]]) for a in map(json.loads, lines)}
    rows = source().load("vqa", "test").remove_columns("image")
    assert {r["sample_id"]: (r["question"], r["answers"]) for r in rows} == official
    assert set(rows["answer_type"]) == {"true/false"}


def test_captions_are_true_of_their_image_and_equal_images_are_one_row() -> None:
    said = source().load("vqa", "test").remove_columns("image")
    true = {(r["image_id"], r["question"]) for r in said if r["answers"] == ["true"]}
    rows = source().load("captioning", "test").remove_columns("image")
    assert {(r["image_id"], caption) for r in rows for caption in r["captions"]} == true
    # Two files of sentence 2986 show the same scene, and the sentence is true of both: one image, one caption.
    assert sorted(r["sample_id"] for r in rows if "-2986-" in r["sample_id"]) == ["hidden-2986-0", "hidden-2986-1"]
    assert all(len(set(r["captions"])) == len(r["captions"]) for r in rows)


def test_no_sentence_and_no_image_is_in_two_splits() -> None:
    sentences, pixels = [], []
    for split in ("train", "validation", "test"):
        rows = source().load("vqa", split)
        sentences.append({sample_id.rsplit("-", 1)[0] for sample_id in rows["sample_id"]})
        pixels.append({np.asarray(image).tobytes() for image in rows["image"]})
    for parts in (sentences, pixels):
        assert sum(map(len, parts)) == len(set.union(*parts))
    # The miniature holds an image that 2350 (validation) and 2540 share, and one that 4020 and 2432 (test) share.
    kept = set(source().load("vqa", "train")["sample_id"]) | set(source().load("vqa", "validation")["sample_id"])
    dev = (MINIATURE / "dev" / "dev.json").read_text().splitlines()
    assert {f"dev-{json.loads(line)['identifier']}" for line in dev} - kept == {"dev-2540-1", "dev-4020-3"}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_rec_boxes_are_tight_around_the_one_object_the_expression_describes(split: str) -> None:
    for row in source().load("rec", split):
        pixels = np.asarray(row["image"].convert("RGB"))
        x, y, width, height = map(int, row["box"])
        inside = pixels[y : y + height, x : x + width]
        drawn = (inside != BACKGROUND).any(-1)
        assert drawn[0].any() and drawn[-1].any() and drawn[:, 0].any() and drawn[:, -1].any()
        words = row["expression"].split()[1:]
        centre = tuple(int(value) for value in inside[height // 2, width // 2])
        for word in words:
            if word in PAINT:
                assert centre == PAINT[word]
            elif word in ("small", "medium", "large"):
                assert width == height == {"small": 10, "medium": 20, "large": 30}[word]
        share = drawn.mean()
        shape = "square" if share > 0.95 else "circle" if share > 0.65 else "triangle"
        assert words[-1] == shape


def test_rec_expressions_are_unique_in_their_image_and_at_most_two() -> None:
    rows = source().load("rec", "test").remove_columns("image")
    annotated = {
        f"hidden-{a['identifier']}": [o for box in a["structured_rep"] for o in box]
        for a in map(json.loads, (MINIATURE / "hidden" / "hidden.json").read_text().splitlines())
    }
    colours = {"Yellow": "yellow", "Black": "black", "#0099ff": "blue"}
    sizes = {10: "small", 20: "medium", 30: "large"}
    lengths = set()
    for row in rows:
        words = set(row["expression"].split()[1:])
        lengths.add(len(words))
        described = [{o["type"], colours[o["color"]], sizes[o["size"]]} for o in annotated[row["image_id"]]]
        assert sum(words <= attributes for attributes in described) == 1
    ids = rows["image_id"]
    assert max(ids.count(image_id) for image_id in ids) == 2
    assert len(lengths) > 1, "full and shorter expressions are mixed"


def test_a_limit_is_a_prefix_of_one_shuffled_order_that_the_file_does_not_set(copy: Path) -> None:
    whole = source().load("vqa", "test")["sample_id"][:]
    assert source().load("vqa", "test", limit=5)["sample_id"][:] == whole[:5]
    path = copy / "hidden" / "hidden.json"
    path.write_text("\n".join(sorted(path.read_text().splitlines())))
    assert source(copy).load("vqa", "test")["sample_id"][:] == whole != sorted(whole)


@pytest.mark.parametrize("inner", [".", "nlvr", "nlvr/nlvr"])
def test_the_root_may_be_the_corpus_a_folder_of_corpora_or_a_clone(tmp_path: Path, inner: str) -> None:
    shutil.copytree(MINIATURE, tmp_path / inner, dirs_exist_ok=True)
    source(tmp_path).check()
    assert source(tmp_path).fingerprint("vqa") == source().fingerprint("vqa"), "content counts, not location"


def test_the_environment_stands_in_for_a_root_that_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETLBENCH_DATA", str(MINIATURE.parent))
    source(None).check()


@pytest.mark.parametrize("given", [True, False])
def test_a_missing_root_says_what_to_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    monkeypatch.delenv("PETLBENCH_DATA", raising=False)
    with pytest.raises(UserError, match="clone the lil-lab/nlvr repository and pass --data-root") as caught:
        source(tmp_path if given else None).check()
    assert str(tmp_path if given else "DIR") + "/nlvr/dev/dev.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_annotation_file_is_named(copy: Path) -> None:
    (copy / "hidden" / "hidden.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*hidden\.json"):
        source(copy).check()


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (lambda line: line[: len(line) // 2], "EOF"),
        (lambda line: line.replace('"sentence"', '"phrase"'), "sentence: Field required"),
        (lambda line: line.replace('"size": 20', '"size": 25'), "size: Input should be 10, 20 or 30"),
        (lambda line: "\udcff" + line, "line 3"),
    ],
)
def test_a_bad_annotation_line_is_named_by_file_and_number(copy: Path, damage, hint: str) -> None:
    path = copy / "hidden" / "hidden.json"
    lines = path.read_text().splitlines()
    lines[2] = damage(lines[2])
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"hidden\.json, line 3 is truncated or malformed") as caught:
        source(copy).check()
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_image_is_refused_and_with_the_option_skipped_and_noted(copy: Path) -> None:
    broken = an_image(copy, "hidden")
    broken.write_bytes(broken.read_bytes()[:800])
    source(copy).check()
    with pytest.raises(UserError, match="1 image of nlvr/hidden is missing or do") as caught:
        source(copy).load("vqa", "test")
    assert str(broken) in str(caught.value) and "skip_broken: true" in str(caught.value)

    lenient = source(copy, skip_broken=True)
    kept = set(lenient.load("vqa", "test")["sample_id"])
    assert set(source().load("vqa", "test")["sample_id"]) - kept == {broken.name.removesuffix("-0.png")}
    (note,) = lenient.notes()
    assert "skipped 1 image of nlvr/hidden" in note and broken.name in note
    assert source().notes() == ()


def test_a_missing_image_is_refused_before_anything_runs(copy: Path) -> None:
    missing = an_image(copy, "dev")
    missing.unlink()
    with pytest.raises(UserError, match=rf"1 image of nlvr/dev .*{missing.name} \(missing\)"):
        source(copy).check()
    lenient = source(copy, skip_broken=True)
    lenient.check()
    lenient.load("captioning", "train")
    assert missing.name in lenient.notes()[0]


def test_skipping_every_image_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "hidden" / "images")
    with pytest.raises(UserError, match="none is left"):
        source(copy, skip_broken=True).check()


def test_hidden_images_are_found_in_whatever_directory_they_lie(copy: Path) -> None:
    image = an_image(copy, "hidden")
    (copy / "hidden" / "images" / "elsewhere").mkdir()
    shutil.move(image, copy / "hidden" / "images" / "elsewhere" / image.name)
    source(copy).check()


def test_further_permutations_change_neither_rows_nor_fingerprint(copy: Path) -> None:
    image = an_image(copy, "hidden")
    shutil.copy(image, image.with_name(image.name.replace("-0.png", "-3.png")))
    assert source(copy).fingerprint("rec") == source().fingerprint("rec")


def test_the_fingerprint_follows_task_options_annotations_and_images(copy: Path) -> None:
    seen = [source(copy).fingerprint("vqa"), source(copy).fingerprint("rec")]
    assert source(copy, skip_broken=True).fingerprint("vqa") == seen[0]
    image = an_image(copy, "dev")
    image.write_bytes(bytes(image.stat().st_size))
    seen.append(source(copy, skip_broken=True).fingerprint("vqa"))
    image.write_bytes(image.read_bytes() + b"0")
    seen.append(source(copy).fingerprint("vqa"))
    path = copy / "dev" / "dev.json"
    path.write_text(path.read_text().replace('"label":"true"', '"label":"false"', 1))
    seen.append(source(copy).fingerprint("vqa"))
    assert len(set(seen)) == 5


def test_an_image_of_another_size_is_a_fault_where_boxes_count_in_pixels(tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    Image.new("RGB", (200, 50)).save(path)
    assert images.fault(path) is None
    assert images.fault(path, (400, 100)) == "200 x 50 pixels, not 400 x 100"
    path.write_bytes(b"not an image")
    assert images.fault(path) == "cannot identify image file it"
