"""Fingerprints change exactly when something changes that a result depends on, and import nothing that they read."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from petlbench.api.registries import BACKBONES, DATASETS, METHODS, TASKS
from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.recipe import Recipe
from petlbench.core.registry import Registry
from petlbench.core.source_code.closure import closure, closure_of, digest_of, of
from petlbench.core.source_code.names import Definition
from petlbench.core.source_code.silence import is_silent
from petlbench.datasets.files.source import FileSource
from petlbench.datasets.official.gqa import GQA, GQAConfig
from petlbench.pipeline import fingerprint
from petlbench.pipeline.data import load_source
from petlbench.pipeline.fingerprint import changed, code_fingerprints, fingerprints
from petlbench.pipeline.freshness import fingerprints_of
from petlbench.pipeline.options import RunOptions
from tests.code_kit import forget, write
from tests.core.test_registry import install
from tests.datasets.test_gqa import miniature
from tests.record_factory import make_record

CELL = Cell(method="lora", task="captioning", dataset="digits", backbone="tiny")
PARTS = {"method", "task", "metric", "backbone", "source", "training"}
REGISTRIES: dict[str, Registry[Any]] = {"method": METHODS, "task": TASKS, "dataset": DATASETS, "backbone": BACKBONES}
SMALL = {"train_scenes": 24, "validation_scenes": 12, "test_scenes": 12}
FILES = {
    "method": "import torch\nfrom .layers import Bottleneck\nclass Mine(Bottleneck):\n    pass\n",
    "layers": "from fpkit import sizes\nclass Bottleneck:\n    width = sizes.WIDTH\n",
    "sizes": "WIDTH = 8\n",
    "other": "class Other:\n    pass\n",
}

Kit = Callable[..., None]


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    """A third party's package of two methods. A call writes changed files."""
    points = {"mine": "fpkit.method:Mine", "other": "fpkit.other:Other"}
    install(tmp_path, "fp-kit", points, {}, group="petlbench.methods")
    monkeypatch.syspath_prepend(tmp_path)
    return lambda **files: write(tmp_path / "fpkit", {**FILES, **files})


def cell(**names: str) -> Cell:
    return CELL.model_copy(update=names)


def stale(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {part for part in PARTS if before[part] != after[part]}


def test_only_the_method_differs_between_cells_of_two_methods(kit: Kit) -> None:
    kit()
    mine, other, same = (code_fingerprints(cell(method=name)) for name in ("mine", "other", "mine"))
    assert mine == same and stale(mine, other) == {"method"}
    kit(sizes="WIDTH = 9\n")
    assert stale(mine, code_fingerprints(cell(method="mine"))) == {"method"}
    assert code_fingerprints(cell(method="other")) == other


def test_a_plugin_depends_on_the_core_that_it_uses(kit: Kit) -> None:
    kit(layers="from petlbench.api.method import Method\nclass Bottleneck(Method): pass")
    names = set(closure("fpkit.method:Mine").names)
    assert {"fpkit.layers:Bottleneck", "petlbench.api.method:Method"} <= names
    assert not {name.partition(":")[0] for name in names} & {"fpkit.other", "torch", "petlbench.pipeline.cell"}


def test_a_plugin_without_its_module_and_an_unknown_method_are_named(kit: Kit, tmp_path: Path) -> None:
    kit()
    (tmp_path / "fpkit" / "method.py").unlink()
    forget()
    with pytest.raises(UserError, match=r"module fpkit\.method"):
        code_fingerprints(cell(method="mine"))
    with pytest.raises(UserError, match="did you mean 'lora'"):
        code_fingerprints(cell(method="lorra"))


class Tree:
    """A copy of petlbench's source to edit, which is read in place of the original."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "petlbench"
        for name in ("petlbench", "petlbench.methods", "petlbench.tasks"):
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.submodule_search_locations
            place = folder / name.replace(".", "/")
            for path in Path(spec.submodule_search_locations[0]).rglob("*.py"):
                copy = place / path.relative_to(spec.submodule_search_locations[0])
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / f"{name}.py"
        source = path.read_text()
        assert old in source
        path.write_text(source.replace(old, new))
        forget()

    def rename(self, old: str, new: str) -> None:
        """Rename everywhere."""
        count = 0
        for path in self.folder.rglob("*.py"):
            source = path.read_text()
            count += source.count(old)
            path.write_text(source.replace(old, new))
        assert count > 1
        forget()


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """Return the fingerprints of the unchanged code."""
    forget()
    return code_fingerprints(CELL)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    made = Tree(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield made
    monkeypatch.undo()
    forget()


EDITS = {
    "a method": ("methods/lora", "self.scale * (", "-self.scale * (", {"method"}),
    "a part of a method": (
        "methods/per_task",
        "make() for task in tasks",
        "make() for task in tasks if task",
        {"method"},
    ),
    "a task": ("tasks/captioning", "rng.integers(len(", "rng.integers(1 + len(", {"task"}),
    "a metric": ("metrics/cider", "SIGMA = 6.0", "SIGMA = 7.0", {"task", "metric"}),
    "a loss": ("api/decoding", 'reduction="none"', 'reduction="mean"', {"task"}),
    "a loader": ("datasets/scenes/digits", "QUESTIONS_PER_SCENE = 2", "QUESTIONS_PER_SCENE = 3", {"source"}),
    "the loop": ("training/loop", "KEPT_LOSSES = 50", "KEPT_LOSSES = 51", {"training"}),
    "the optimizer": ("training/optimizers", "value=-size", "value=-2 * size", {"training"}),
    "a backbone's part": ("backbones/parts/vision", "std=0.02", "std=0.03", {"backbone"}),
    "a schema": ("api/schemas", '"captions": List(', '"captions": list(', {"task", "source"}),
}
SILENT_EDITS = [
    ("core/files", "choose another folder", "take another"),
    ("core/messages", "did you mean", "perhaps"),
    ("core/units", ":.3g", ":.4g"),
    ("core/drawing", "LINE_PIXELS = 17", "LINE_PIXELS = 18"),
    ("training/optimizers", '"""Return the rate', '"""Give the rate'),
    ("training/optimizers", "fallen", "sunk"),
    ("methods/lora", 'description="', 'description="the '),
    ("methods/lora", "Hu et al.", "Hu, Shen et al."),
]


@pytest.mark.parametrize("case", EDITS)
def test_an_edit_of_the_code_makes_its_parts_stale(before: dict[str, str], tree: Tree, case: str) -> None:
    name, old, new, expected = EDITS[case]
    tree.edit(name, old, new)
    assert stale(before, code_fingerprints(CELL)) == expected


def test_edits_of_messages_and_prose_leave_every_part_fresh(before: dict[str, str], tree: Tree) -> None:
    for edit in SILENT_EDITS:
        tree.edit(*edit)
    assert stale(before, code_fingerprints(CELL)) == set()


def test_a_file_that_moves_and_names_that_change_leave_every_part(before: dict[str, str], tree: Tree) -> None:
    (tree.folder / "training" / "loop.py").rename(tree.folder / "pipeline" / "steps.py")
    tree.rename("petlbench.training.loop", "petlbench.pipeline.steps")
    for old, new in {
        "_forward(": "_pass_on(",
        "LowRank": "Narrow",
        "_insert(": "_put_in(",
        "TrainingSetup": "Situation",
    }.items():
        tree.rename(old, new)
    assert stale(before, code_fingerprints(CELL)) == set()
    tree.edit("pipeline/steps", "KEPT_LOSSES = 50", "KEPT_LOSSES = 51")
    assert stale(before, code_fingerprints(CELL)) == {"training"}


FOREIGN = {
    "training/optimizers": ("else 0.1", "else 0.2"),
    "training/precision": ("def computing", "def _f(): pass\ndef computing"),
}


def test_no_data_set_depends_on_how_models_are_trained(tree: Tree) -> None:
    def now() -> dict[str, str]:
        digests = {}
        for name in DATASETS.names():
            source = DATASETS.get(name)
            readers = source.readers if issubclass(source, FileSource) else ()
            for cls in (source, *readers):
                code = closure_of(cls)
                assert code is not None
                assert not code.modules & {
                    f"petlbench.{module}" for module in ("training.loop", "pipeline.assembly", "training.precision")
                }
                assert "petlbench.backbones.supplied" not in code.modules
                digests[f"{name} {cls.__name__}"] = code.digest
        return digests

    before = now()
    tree.edit("training/optimizers", "else 0.1", "else 0.2")
    tree.edit("pipeline/compatibility", "TRIAL_SECONDS = 10.0", "TRIAL_SECONDS = 11.0")
    assert now() == before
    tree.edit("datasets/files/reading", "adapter.validate_json(data)", "adapter.validate_json(data + b'')")
    changed_too = {name for name, digest in now().items() if digest != before[name]}
    assert {"gqa BalancedQuestions", "vqav2 VQAv2"} & changed_too == {"gqa BalancedQuestions", "vqav2 VQAv2"}
    assert not {name for name in changed_too if name.startswith(("digits", "shapes", "nlvr "))}


def test_training_code_leaves_the_data_and_the_tables_of_a_data_set(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))
    root = miniature(tmp_path / "data")

    def now() -> tuple[str, str | None]:
        source = GQA(GQAConfig(), root)
        return source.fingerprint("vqa"), source._key("vqa", "train_balanced")

    data, key = now()
    tree.edit("training/optimizers", "else 0.1", "else 0.2")
    assert now() == (data, key)
    tree.edit("datasets/official/gqa", '"empty question"', '"no question"')
    assert now()[0] == data and now()[1] != key


REACHED = {
    "petlbench.methods.m2ist.method:M2IST": ("methods.m2ist.side:SideStack", "methods.m2ist.ladder:Ladder"),
    "petlbench.methods.lora:LoRA": ("methods.lora:LowRank", "api.method:Method", "methods.per_task:PerTask"),
    "petlbench.tasks.vqa:VisualQuestionAnswering": ("metrics.vqa:vqa_accuracy", "api.decoding:token_losses"),
    "petlbench.tasks.captioning:Captioning": ("metrics.cider:cider_d", "api.decoding:generated_texts"),
    "petlbench.datasets.official.gqa:GQA": (
        "datasets.official.gqa:BalancedQuestions",
        "datasets.files.source:held_out",
        "datasets.hub.parquet:HubParquet",
    ),
    "petlbench.backbones.tiny:Tiny": ("backbones.parts.vision:vision_stack", "api.sites:Layer"),
    fingerprint.TRAINING: (
        "training.optimizers:rate",
        "training.optimizers:optimizer",
        "training.optimizers:ReleasedAdamW",
        "measure.memory:account",
    ),
}
OUT_OF_REACH = {
    "petlbench.methods.lora:LoRA": ("petlbench.pipeline.cell", "petlbench.tasks", "petlbench.metrics"),
    "petlbench.tasks.captioning:Captioning": (
        "petlbench.metrics.boxes",
        "petlbench.training.loop",
        "petlbench.core.drawing",
    ),
    "petlbench.datasets.official.refer:RefCOCO": (
        "petlbench.training.loop",
        "petlbench.pipeline.assembly",
        "petlbench.core.record",
    ),
    fingerprint.TRAINING: tuple(
        f"petlbench.{name}"
        for name in ("launch", "cli", "commands", "leaderboard", "plots", "statistics", "methods", "tasks", "metrics")
    ),
}


@pytest.mark.parametrize("start", REACHED)
def test_a_part_reaches_what_it_computes_with(start: str) -> None:
    forget()
    assert {f"petlbench.{name}" for name in REACHED[start]} - set(closure(start).names) == set()


@pytest.mark.parametrize("start", OUT_OF_REACH)
def test_a_part_does_not_reach_what_follows_or_starts_it(start: str) -> None:
    forget()
    assert [name for name in closure(start).names if name.startswith(OUT_OF_REACH[start])] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "task", "dataset"),
    [
        ("m2ist", "rec", "digits"),
        ("lora", "vqa", "digits"),
        ("lst", "captioning", "digits"),
        ("vl_pet", "retrieval", "shapes"),
        ("compacter", "pairs", "digit_pairs"),
    ],
)
def test_all_that_a_cell_runs_is_in_one_of_its_parts(method: str, task: str, dataset: str, tmp_path: Path) -> None:
    """Compare the functions that a running cell calls with the fingerprints; only silent ones may be missing."""
    from petlbench.pipeline.cell import run_cell

    recipe = Recipe(steps=4, batch_size=4, eval_batch_size=8, train_limit=16, eval_limit=8)
    names = {"method": method, "task": task, "dataset": dataset}
    one = CELL.model_copy(update={**names, "recipe": recipe, "dataset_config": SMALL})
    given = dict.fromkeys(PARTS, "")  # given, so that the cell does not compute fingerprints itself
    ran: set[Definition] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        name, code = str(frame.f_globals.get("__name__")), frame.f_code
        if event == "call" and name.startswith("petlbench.") and code.co_flags & inspect.CO_OPTIMIZED:
            ran.add(Definition(name, code.co_qualname.partition(".")[0]))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        record = run_cell(one, tmp_path, RunOptions(device="cpu"), fingerprints=given)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert record.outcome == "ok" and len(ran) > 150
    starts = [REGISTRIES[kind].target(name) for kind, name in {**names, "backbone": "tiny"}.items()]
    covered = {found for start in [*starts, fingerprint.TRAINING] for found in closure(start).definitions}
    missed = {one for one in ran - covered if not one.name.startswith(("<", "__create_fn__")) and not is_silent(one)}
    assert missed == set()


def test_every_builtin_entry_has_fingerprints() -> None:
    forget()
    builtin = {
        kind: [name for name in registry.names() if registry.target(name).startswith("petlbench.")]
        for kind, registry in REGISTRIES.items()
    }
    found = []
    for kind, names in builtin.items():
        for name in names:
            found.append(code_fingerprints(CELL.model_copy(update={kind: name})))
            assert found[-1].keys() == PARTS
    assert all(len(digest) == 16 and int(digest, 16) for digests in found for digest in digests.values())
    tasks = [digests for digests, name in zip(found[len(builtin["method"]) :], builtin["task"], strict=False)]
    assert len({digests["task"] for digests in tasks}) == len({d["metric"] for d in tasks}) == len(builtin["task"])


def test_a_metric_is_what_a_task_uses_of_metrics_or_the_task_itself(kit: Kit) -> None:
    forget()
    own = {one for one in closure("petlbench.tasks.captioning:Captioning").definitions if "metrics" in one.module}
    assert "petlbench.metrics.cider" in {one.module for one in own}
    assert code_fingerprints(CELL)["metric"] == digest_of(sorted(of(one).digest for one in own))
    assert fingerprint.metric_digest(closure("petlbench.api.decoding")) == closure("petlbench.api.decoding").digest


def test_neither_torch_nor_any_of_the_code_is_imported() -> None:
    code = (
        "import sys; from petlbench.pipeline.fingerprint import code_fingerprints\n"
        "from petlbench.core.cell import Cell\n"
        "code_fingerprints(Cell(method='lora', task='captioning', dataset='digits', backbone='tiny'))\n"
        "heavy = ('torch', 'petlbench.pipeline.cell', 'petlbench.tasks', 'petlbench.metrics')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_data_and_weights_count_by_their_content(tmp_path: Path) -> None:
    from petlbench.backbones.tiny import Tiny
    from petlbench.backbones.weights.tensors import ASSETS

    def now(**config: str) -> dict[str, str]:
        return fingerprints(cell.model_copy(update={"backbone_config": config}))

    cell = Cell(
        method="lora",
        task="rec",
        dataset="shapes",
        dataset_config={"train_scenes": 1, "validation_scenes": 1, "test_scenes": 1},
        backbone="tiny",
    )
    builtin = now()
    assert builtin.keys() == PARTS | {"data", "weights"}
    copy = tmp_path / "copy.safetensors"
    content = (ASSETS / Tiny.Config().weights).read_bytes()
    copy.write_bytes(content)
    assert now(weights=str(copy)) == builtin
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert now(weights=str(copy))["weights"] != builtin["weights"] != now(weights="none")["weights"]
    copy.unlink()
    with pytest.raises(UserError, match=r"copy\.safetensors"):
        now(weights=str(copy))
    other = cell.model_copy(update={"dataset_config": {**cell.dataset_config, "seed": 1}})
    assert changed(make_record(fingerprints=builtin), fingerprints(other)) == ("data",)


def test_what_changed_is_named_and_what_was_never_recorded_has_changed() -> None:
    record = make_record(fingerprints={"method": "a", "task": "b", "data": "c"})
    assert changed(record, {"method": "a", "task": "b"}) == ()
    assert changed(record, {"method": "x", "task": "b", "weights": "d"}) == ("method", "weights")


def test_the_cells_of_a_run_open_each_source_once_and_get_what_each_would_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from petlbench.pipeline import data

    opened: list[str] = []
    real = load_source
    monkeypatch.setattr(data, "load_source", lambda cell, root: (opened.append(cell.dataset), real(cell, root))[1])
    small = {"train_scenes": 24, "validation_scenes": 12, "test_scenes": 12}
    cells = [
        CELL.model_copy(update={"task": task, "dataset": dataset, "dataset_config": small})
        for task in ("rec", "vqa")
        for dataset in ("digits", "shapes")
    ]
    found = fingerprints_of(cells, None)
    assert opened == ["digits", "shapes"]
    assert found == {cell.id: fingerprints(cell) for cell in cells}
