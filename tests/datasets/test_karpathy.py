"""Tests of COCO and Flickr30k on miniatures of Karpathy's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from petlbench.api.schemas import CAPTIONING
from petlbench.core.errors import UserError
from petlbench.datasets.files.declaration import FilesConfig
from petlbench.datasets.files.reading import read_json
from petlbench.datasets.official import karpathy
from petlbench.datasets.official.karpathy import COCO, Flickr30k, Karpathy
from petlbench.results.store import Store
from tests.miniatures import one_epoch, picture

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "multiway_adapter" / "g9_index.json").read_text())
PARTS = ["train"] * 5 + ["test"] * 2 + ["restval"] * 3 + ["val"] * 3 + ["test"] * 2
COLOURS = ("red", "blue", "green", "pink", "grey", "black", "white")
PERIOD = 5  # the piece "." in the vocabulary of BEiT-3


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))


def document(name: str) -> dict[str, Any]:
    """Return a file's document: 15 images (fewer in flickr30k, without restval), 5 to 7 captions each."""
    entries = []
    for rank, split in enumerate(PARTS):
        if name == "flickr30k" and split == "restval":
            continue
        raws = [f"A {colour} thing, number {rank}." for colour in COLOURS]
        sentences = [
            {"tokens": raw.split(), "raw": raw, "imgid": rank, "sentid": 10 * rank + number}
            for number, raw in enumerate(raws[: 5 + rank % 3])
        ]
        entry = {"imgid": rank, "split": split, "sentids": [s["sentid"] for s in sentences], "sentences": sentences}
        folder = "train2014" if split == "train" else "val2014"
        number = 1000 - rank
        entry |= (
            {"filepath": folder, "filename": f"COCO_{folder}_{number:012d}.jpg", "cocoid": number}
            if name == "coco"
            else {"filename": f"{number}.jpg"}
        )
        entries.append(entry)
    return {"images": entries, "dataset": name}


def written(root: Path, content: dict[str, Any], name: str, below: str = "", images: str | None = None) -> Path:
    """Write the file at `below` and pictures in the folder `images`, and return the data root."""
    (root / below).mkdir(parents=True, exist_ok=True)
    (root / below / f"dataset_{name}.json").write_text(json.dumps(content))
    images = ("" if name == "coco" else "flickr30k-images") if images is None else images
    for rank, entry in enumerate(content["images"]):
        picture(root / images / entry.get("filepath", "") / entry["filename"], seed=rank)
    return root


def source(root: Path, name: str = "coco", **options: Any) -> Karpathy:
    return {"coco": COCO, "flickr30k": Flickr30k}[name](FilesConfig(**options), root)


def changed(tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], name: str = "coco") -> Karpathy:
    """Return a source with all its images, whose file's entries were changed afterwards."""
    content = document(name)
    root = written(tmp_path / "data", content, name)
    change(content["images"])
    (root / f"dataset_{name}.json").write_text(json.dumps(content))
    return source(root, name)


def refusal(made: Karpathy, split: str = "test") -> str:
    with pytest.raises(UserError) as caught:
        made.load("retrieval", split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "rows"), [("coco", 8), ("flickr30k", 5)])
@pytest.mark.parametrize(("task", "metric"), [("retrieval", "i2t_r1"), ("captioning", "cider_d")])
def test_a_miniature_goes_through_an_epoch_and_is_tested(
    tmp_path: Path, name: str, rows: int, task: str, metric: str
) -> None:
    root = written(tmp_path / "data", document(name), name)
    record = one_epoch(task, name, root, tmp_path / "out", rows=rows)
    assert record.outcome == "ok", record.reason
    assert metric in record.metrics
    samples = Store(tmp_path / "out").samples(record)
    assert samples is not None
    assert samples["sample_ids"] == ["995", "994", "987", "986"]


def test_rows_are_images_in_file_order_with_all_their_captions(tmp_path: Path) -> None:
    made = source(written(tmp_path, document("coco"), "coco"))
    for task in ("captioning", "retrieval"):
        rows = made.load(task, "test")
        assert rows.features.keys() == CAPTIONING.keys()
        assert rows["sample_id"] == rows["image_id"] == ["995", "994", "987", "986"]
        assert [len(captions) for captions in rows["captions"]] == [7, 5, 6, 7]
        assert rows[0]["captions"][:2] == ["A red thing, number 5.", "A blue thing, number 5."]
        assert rows[0]["image"].size == (64, 48)


def test_coco_trains_on_train_and_restval_and_selects_on_val(tmp_path: Path) -> None:
    made = source(written(tmp_path, document("coco"), "coco"))
    numbers = {split: made.load("retrieval", split)["image_id"] for split in ("train", "validation", "restval")}
    assert numbers["train"] == ["1000", "999", "998", "997", "996", *numbers["restval"]]
    assert numbers["restval"] == ["993", "992", "991"]
    assert numbers["validation"] == ["990", "989", "988"]


def test_flickr_photos_are_known_by_their_number(tmp_path: Path) -> None:
    made = source(written(tmp_path, document("flickr30k"), "flickr30k"), "flickr30k")
    assert made.load("captioning", "val")["image_id"] == ["990", "989", "988"]
    assert made.parts("captioning") == ("train", "val", "test")


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_the_rows_are_the_index_that_the_released_code_builds(tmp_path: Path, name: str) -> None:
    made = source(written(tmp_path, GOLDEN[name], name), name)
    prefix = {"coco": "coco_retrieval", "flickr30k": "flickr30k"}[name]
    splits = [split for split in ("train", "val", "test") if f"{prefix}.{split}.jsonl" in GOLDEN["index"]]
    for split in splits:
        rows = made.load("retrieval", {"val": "validation"}.get(split, split)).with_format(None)
        lines = [(rank, row, caption) for rank, row in enumerate(rows) for caption in row["captions"]]
        index = GOLDEN["index"][f"{prefix}.{split}.jsonl"]
        where = [str(Path(row["image"]["path"]).relative_to(tmp_path)) for _, row, _ in lines]
        assert where == [line["image_path"] for line in index]
        assert [rank for rank, _, _ in lines] == [line["image_id"] for line in index]
        kept = {split, "restval"} if split == "train" else {split}
        raws = [sentence["raw"] for e in GOLDEN[name]["images"] if e["split"] in kept for sentence in e["sentences"]]
        assert [caption for _, _, caption in lines] == raws
        ends = [line["text_segment"][-1] == PERIOD for line in index]
        assert [caption.endswith(".") for _, _, caption in lines] == ends


@pytest.mark.parametrize(
    ("name", "below", "images"),
    [
        ("coco", "", "images"),
        ("coco", "annotations", "coco/images"),
        ("coco", "coco/karpathy", "coco"),
        ("coco", "coco", "other/images/mscoco/images"),
        ("flickr30k", "", "images"),
        ("flickr30k", "karpathy", "flickr30k_images"),
        ("flickr30k", "flickr30k", "flickr30k/flickr30k-images"),
        ("flickr30k", "Flickr30k/annotations", "Flickr30k/images"),
        ("flickr30k", "caption_datasets", "flickr30k_images/flickr30k_images"),
    ],
)
def test_files_are_found_where_people_keep_them(tmp_path: Path, name: str, below: str, images: str) -> None:
    made = source(written(tmp_path, document(name), name, below, images), name)
    made.check()
    assert len(made.load("retrieval", "test")) == 4


def test_editions_without_a_folder_say_it_in_the_file_name(tmp_path: Path) -> None:
    def without(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            del entry["filepath"]

    rows = changed(tmp_path, without).load("retrieval", "train").with_format(None)
    folders = [Path(row["image"]["path"]).parent.name for row in rows]
    assert folders == ["train2014"] * 5 + ["val2014"] * 3


def test_captions_are_kept_as_written_but_for_white_space_around_them(tmp_path: Path) -> None:
    def untidy(entries: list[dict[str, Any]]) -> None:
        entries[5]["sentences"][0]["raw"] = ' Two  "dogs",\nin Caf\u00e9 \u65e5.. \n'

    rows = changed(tmp_path, untidy).load("captioning", "test")
    assert rows[0]["captions"][0] == 'Two  "dogs",\nin Caf\u00e9 \u65e5..'


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    def silent(entries: list[dict[str, Any]]) -> None:
        entries[5]["sentences"] = []
        entries[6]["sentences"][1]["raw"] = " \n"
        for sentence in entries[13]["sentences"]:
            sentence["raw"] = ""

    made = changed(tmp_path, silent)
    rows = made.load("retrieval", "test")
    assert rows["image_id"] == ["994", "986"]
    assert [len(captions) for captions in rows["captions"]] == [4, 7]
    assert "Blue" not in rows[0]["captions"][1] and rows[0]["captions"][1].startswith("A green")
    assert made.notes() == (
        "coco test: left out 7 (blank caption), first of image 994",
        "coco test: left out 2 (image without captions), first image 995",
    )
    made.load("retrieval", "val")
    assert len(made.notes()) == 2  # other parts lack nothing


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda e: e[3].update(cocoid=e[8]["cocoid"]), "has cocoid 992 twice"),
        (lambda e: e[3]["sentences"][1].update(sentid=62), "has sentid 62 twice"),
        (lambda e: e[3].update(split="restvall"), "in the split 'restvall': did you mean 'restval'? there are train, "),
        (lambda e: e[3].update(filename="../../etc/passwd"), "'train2014/../../etc/passwd', which is not a file below"),
        (lambda e: e[3].update(filename="../../secret.jpg"), "'train2014/../../secret.jpg', which is not a file below"),
        (lambda e: e[3].update(filepath="/etc", filename="passwd"), "names the image '/etc/passwd'"),
        (lambda e: e[3].pop("cocoid"), "gives 'COCO_train2014_000000000997.jpg' no cocoid"),
        (lambda e: e[3].pop("split"), "images.3.split: Field required"),
        (lambda e: e[3].update(sentences="A dog."), "images.3.sentences: Input should be a valid array"),
        (lambda e: e[3]["sentences"][0].update(raw=None), "images.3.sentences.0.raw: Input should be a valid string"),
        (lambda e: [x.update(split="train") for x in e], "no usable row for retrieval, test"),
    ],
)
def test_damage_is_refused_in_one_line_that_names_the_file(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], expected: str
) -> None:
    message = refusal(changed(tmp_path, change))
    assert expected in message
    assert "dataset_coco.json" in message or "no usable row" in message
    assert not list((tmp_path / "cache").rglob("*.parquet")) or "no usable row" in message


def test_a_photo_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    made = changed(tmp_path, lambda entries: entries[0].update(filename="999.jpg"), "flickr30k")
    assert "has filename 999 twice" in refusal(made)


def test_a_truncated_file_and_one_of_another_data_set_are_refused(tmp_path: Path) -> None:
    root = written(tmp_path, document("coco"), "coco")
    path = root / "dataset_coco.json"
    whole = path.read_text()
    path.write_text(json.dumps({**document("flickr30k"), "dataset": "flickr8k"}))
    assert "is of the data set 'flickr8k', not 'coco': get dataset_coco.json" in refusal(source(root))
    path.write_text(whole[: len(whole) // 2])
    assert f"{path} is truncated or malformed" in refusal(source(root))


def test_the_error_for_a_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    message = refusal(source(tmp_path, "flickr30k"))
    assert "flickr30k is not there" in message
    assert "dataset_flickr30k.json (here or in karpathy, annotations, " in message
    assert "caption_datasets.zip" in message


def test_the_error_for_an_unknown_split_lists_the_known_ones(tmp_path: Path) -> None:
    made = source(written(tmp_path, document("coco"), "coco"))
    assert "no split 'restva': did you mean 'restval'?" in refusal(made, "restva")


def test_the_file_is_parsed_once_for_all_parts_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = Mock(wraps=read_json)
    monkeypatch.setattr(karpathy, "read_json", parse)
    content = document("coco")
    root = written(tmp_path, content, "coco")
    made = source(root)
    for split in ("train", "validation", "test"):
        made.load("retrieval", split)
    assert parse.call_count == 1
    content["images"][5]["sentences"][0]["raw"] = "Another thing altogether."
    (root / "dataset_coco.json").write_text(json.dumps(content))
    assert made.load("retrieval", "test")[0]["captions"][0] == "Another thing altogether."
    assert parse.call_count == 2


def test_published_sizes_add_up_to_the_whole_data_sets() -> None:
    coco, flickr = (kind.sizes["retrieval"] for kind in (COCO, Flickr30k))
    assert sum(part["images"] for part in coco.values()) == 123_287
    assert sum(part["captions"] for part in coco.values()) == 616_767
    assert coco["train"]["captions"] + coco["restval"]["captions"] == 566_747
    assert all(part["captions"] == 5 * part["images"] for part in flickr.values())
