"""Tests of the embedded data: scenes are valid, texts about them are true, and the cache is never stale."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from petlbench.api.registries import TASKS
from petlbench.api.source import Split
from petlbench.core.errors import UserError
from petlbench.datasets.scenes import digits
from petlbench.datasets.scenes.digits import Digits, Scenes, ScenesConfig, Shapes
from petlbench.datasets.scenes.language import VOCABULARY, captions, expressions, questions
from petlbench.datasets.scenes.world import (
    COLOURS,
    KINDS,
    SIZES,
    SPLITS,
    Domain,
    Obj,
    Scene,
    background,
    digit_samples,
    make_scene,
    stream,
)

DOMAINS: list[Domain] = ["shapes", "digits"]
SMALL = ScenesConfig(train_scenes=6, validation_scenes=4, test_scenes=3)
both = pytest.mark.parametrize("domain", DOMAINS)


def some(domain: Domain, count: int, split: Split = "train", size: int = 48) -> list[Scene]:
    return [make_scene(domain, split, 0, i, size) for i in range(count)]


def language(domain: Domain, index: int) -> np.random.Generator:
    return stream(domain, "train", 0, index, purpose=2)


# A second reading of the grammar, from the text alone, sharing no code with the generator.
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
ENDS = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}


def centre(thing: Obj, axis: int) -> float:
    return thing.box[axis] + thing.box[axis + 2] / 2


def read(text: str, scene: Scene) -> list[Obj]:
    """Return the objects that 'red three left of the small four', with or without 'the', describes."""
    head, *rest = re.split(r" (left of|right of|above|below) ", text.removeprefix("the "), maxsplit=1)
    words = head.split()
    attributes = [word for word in words if word != "object" and word not in ENDS]
    found = [o for o in scene.objects if all(word in (o.kind, o.colour, o.size) for word in attributes)]
    if rest:
        (landmark,) = read(rest[1], scene)
        axis, sign = SIDES[rest[0]]
        found = [o for o in found if o is not landmark and sign * (centre(o, axis) - centre(landmark, axis)) > 0]
    if words[0] in ENDS:
        axis, sign = ENDS[words[0]]
        found = [max(found, key=lambda o: sign * centre(o, axis))]
    return found


def answer(question: str, scene: Scene) -> str:
    def the(text: str) -> Obj:
        (thing,) = read(text, scene)
        return thing

    def truth(value: bool) -> str:
        return "yes" if value else "no"

    if match := re.fullmatch(r"what (colour|size) is (.*)", question):
        return str(getattr(the(match[2]), match[1]))
    if match := re.fullmatch(r"what is (.*)", question):
        return the(match[1]).kind
    if match := re.fullmatch(r"how many (.*)objects are there", question):
        return str(len(read(f"{match[1]}object", scene)))
    if match := re.fullmatch(r"is there an? (.*)", question):
        return truth(bool(read(match[1], scene)))
    if match := re.fullmatch(r"are there more (\w+) objects than (\w+) objects", question):
        colours = [thing.colour for thing in scene.objects]
        return truth(colours.count(match[1]) > colours.count(match[2]))
    if match := re.fullmatch(r"is (the .*) (larger than|smaller than|the same colour as) (the .*)", question):
        first, second = the(match[1]), the(match[3])
        if match[2] == "the same colour as":
            return truth(first.colour == second.colour)
        return truth((first.size, second.size) == (("large", "small") if "larger" in match[2] else ("small", "large")))
    match = re.fullmatch(r"is (the .*?) (left of|right of|above|below) (the .*)", question)
    assert match, question
    axis, sign = SIDES[match[2]]
    return truth(sign * (centre(the(match[1]), axis) - centre(the(match[3]), axis)) > 0)


@both
@pytest.mark.parametrize("size", [48, 96])
def test_objects_are_apart_inside_and_of_two_clear_sizes(domain: Domain, size: int) -> None:
    for scene in some(domain, 100, size=size):
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert 2 <= len(scene.objects) <= 5
        for x, y, w, h in (thing.box for thing in scene.objects):
            assert x >= 1 and y >= 1 and x + w < size and y + h < size
        for (ax, ay, aw, ah), (bx, by, bw, bh) in combinations([thing.box for thing in scene.objects], 2):
            assert ax + aw < bx or bx + bw < ax or ay + ah < by or by + bh < ay
        for thing in scene.objects:
            assert (thing.box[3] * 48 / size > 13) == (thing.size == "large")


@both
def test_boxes_are_tight_and_objects_stand_out(domain: Domain) -> None:
    for index, scene in enumerate(some(domain, 100)):
        empty = background(domain, stream(domain, "train", 0, index, purpose=1), 48)
        drawn = np.abs(scene.image - empty).max(-1) > 1
        for thing in scene.objects:
            x, y, w, h = thing.box
            patch = drawn[y : y + h, x : x + w]
            assert patch[0].any() and patch[-1].any() and patch[:, 0].any() and patch[:, -1].any()
            contrast = np.linalg.norm(scene.image[y : y + h, x : x + w] - empty[y : y + h, x : x + w], axis=-1)
            assert contrast.max() > 90, thing
            drawn[y : y + h, x : x + w] = False
        assert not drawn.any()


@both
def test_a_scene_depends_on_its_coordinates_alone(domain: Domain) -> None:
    again = make_scene(domain, "train", 0, 3)
    assert again.objects == some(domain, 4)[3].objects
    assert np.array_equal(again.image, make_scene(domain, "train", 0, 3).image)
    first = expressions(again, language(domain, 3), 2)
    assert first == expressions(again, language(domain, 3), 2)
    others = [
        make_scene(domain, "validation", 0, 3),
        make_scene(domain, "test", 0, 3),
        make_scene(domain, "train", 1, 3),
    ]
    assert all(not np.array_equal(again.image, other.image) for other in others)


def test_splits_share_no_digit() -> None:
    members = [{i for samples in digit_samples(split).values() for i in samples} for split in SPLITS]
    assert sum(map(len, members)) == len(set.union(*members)) == 1797
    assert [round(len(part) / 1797, 1) for part in members] == [0.6, 0.2, 0.2]
    assert all(len(digit_samples(split)[kind]) >= 30 for split in SPLITS for kind in KINDS["digits"])


@both
def test_every_expression_means_the_one_object_it_is_given_with(domain: Domain) -> None:
    for index, scene in enumerate(some(domain, 200)):
        found = expressions(scene, language(domain, index), 2)
        assert len({text for text, _ in found}) == 2
        for text, target in found:
            assert read(text, scene) == [scene.objects[target]], text


@both
def test_most_expressions_fail_whoever_cannot_tell_kinds(domain: Domain) -> None:
    blind = 0
    for index, scene in enumerate(some(domain, 300)):
        ((text, target),) = expressions(scene, language(domain, index), 1)
        veiled = " ".join("object" if word in KINDS[domain] else word for word in text.split())
        with suppress(ValueError):  # the landmark may no longer be one object
            blind += read(veiled, scene) == [scene.objects[target]]
    assert blind / 300 < 0.15


@both
def test_answers_are_true_and_none_is_common(domain: Domain) -> None:
    counts: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for index, scene in enumerate(some(domain, 1000)):
        for question, reply, kind in questions(scene, language(domain, index), 2):
            assert answer(question, scene) == reply, question
            counts[reply] += 1
            types[kind] += 1
    assert counts.total() == 2000 and set(types) == {"colour", "kind", "size", "count", "exist", "compare"}
    assert counts.most_common(1)[0][1] / 2000 < 0.25
    assert abs(counts["yes"] - counts["no"]) / 2000 < 0.05
    assert {*COLOURS, *SIZES, *KINDS[domain], "0", "1", "2", "3", "4", "5"} < set(counts)


@both
def test_captions_name_every_object_within_28_words(domain: Domain) -> None:
    for index, scene in enumerate(some(domain, 100)):
        lines = captions(scene, language(domain, index))
        assert len(set(lines)) == 5
        for line in lines:
            words = line.split()
            named = Counter(pairwise(words))
            assert len(words) <= 28
            wanted = Counter((thing.colour, thing.kind) for thing in scene.objects)
            assert {pair: named[pair] for pair in wanted} == dict(wanted)


@both
def test_every_word_is_in_the_vocabulary(domain: Domain) -> None:
    words: set[str] = set()
    for index, scene in enumerate(some(domain, 200)):
        rng = language(domain, index)
        texts = [text for text, _ in expressions(scene, rng, 2)] + captions(scene, rng)
        texts += [text for question in questions(scene, rng, 3) for text in question[:2]]
        words.update(" ".join(texts).split())
    assert words <= set(VOCABULARY)
    assert tuple(sorted(set(VOCABULARY))) == VOCABULARY and len(VOCABULARY) <= 150


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))
    digits.generate_scenes.cache_clear()
    return tmp_path / "cache" / "scenes"


@pytest.mark.parametrize("source", [Shapes(SMALL), Digits(SMALL)])
def test_all_four_tasks_come_in_schema_from_the_same_scenes(source: Scenes, cache: Path) -> None:
    images = {}
    for task, rows in {"rec": 12, "vqa": 12, "captioning": 6, "retrieval": 6}.items():
        data = source.load(task, "train")
        assert data.features == source.features(task) == TASKS.get(task).features and len(data) == rows
        assert len(set(data["sample_id"])) == rows
        images[task] = {row["image_id"]: np.asarray(row["image"]).tobytes() for row in data}
    assert images["rec"] == images["vqa"] == images["captioning"] == images["retrieval"]
    wanted = make_scene(source.domain, "train", 0, 0).image.tobytes()
    assert images["rec"][f"{source.domain}-train-00000"] == wanted


def test_rows_of_a_scene_carry_what_is_said_about_it(cache: Path) -> None:
    source = Digits(SMALL)
    for row in source.load("rec", "test"):
        scene = make_scene("digits", "test", 0, int(row["image_id"].split("-")[-1]))
        (thing,) = read(row["expression"], scene)
        assert row["box"] == list(thing.box)
    for row in source.load("vqa", "test"):
        scene = make_scene("digits", "test", 0, int(row["image_id"].split("-")[-1]))
        assert row["answers"] == [answer(row["question"], scene)]
    assert [len(row["captions"]) for row in source.load("captioning", "test")] == [5, 5, 5]


def test_limit_keeps_the_first_rows(cache: Path) -> None:
    source = Shapes(SMALL)
    assert source.load("rec", "train", 3)["sample_id"][:] == source.load("rec", "train")["sample_id"][:3]
    assert len(source.load("captioning", "test", 100)) == 3


def test_a_split_is_generated_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Shapes(SMALL).load("rec", "test").to_list()
    monkeypatch.setattr(digits, "generate_scenes", lambda *_: pytest.fail("generated again"))
    assert Shapes(SMALL).load("rec", "test").to_list() == before
    assert len(Shapes(SMALL).load("vqa", "test")) == 6


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_cache_is_rebuilt(cache: Path, damage: str) -> None:
    before = Shapes(SMALL).load("captioning", "test").to_list()
    (path,) = cache.glob("*/test.parquet")
    whole = path.read_bytes()
    at = whole.rindex(b"PNG") + 60
    flipped = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
    path.write_bytes({"truncated": whole[: len(whole) // 2], "flipped": flipped, "emptied": b""}[damage])
    assert Shapes(SMALL).load("captioning", "test").to_list() == before
    assert path.read_bytes() == whole and not list(cache.glob("*/.*.tmp"))


def test_an_unwritable_cache_costs_time_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "file"))
    assert len(Shapes(SMALL).load("vqa", "validation")) == 8


def test_a_full_disk_leaves_nothing_half_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert len(Shapes(SMALL).load("vqa", "validation")) == 8
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_the_fingerprint_follows_configuration_task_and_content(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Shapes(SMALL).fingerprint("rec")
    assert wanted == Shapes(SMALL).fingerprint("rec") and re.fullmatch("[0-9a-f]{64}", wanted)
    others = [Shapes(SMALL).fingerprint("vqa"), Digits(SMALL).fingerprint("rec")]
    others.append(Shapes(SMALL.model_copy(update={"seed": 1})).fingerprint("rec"))
    monkeypatch.setitem(COLOURS, "red", (255, 0, 0))
    digits._digest.cache_clear()  # as in a new process
    monkeypatch.setattr(digits, "_digest", digits._digest.__wrapped__)
    assert wanted not in [*others, Shapes(SMALL).fingerprint("rec")]


def test_an_unknown_task_is_one_line_that_names_the_tasks() -> None:
    with pytest.raises(UserError, match=r"shapes: no rows for task 'nlvr'; choose one of captioning, rec"):
        Shapes(SMALL).load("nlvr", "train")
