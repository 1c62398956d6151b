"""The documents hold: their commands parse, their examples run, their tables are complete."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from argparse import Namespace
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import petlbench
from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, adapt
from petlbench.api.source import Source
from petlbench.api.task import Task
from petlbench.backbones.tiny import Tiny, TinyConfig
from petlbench.commands import main
from petlbench.commands.list import KINDS
from petlbench.core.cell import Cell
from petlbench.datasets.files.source import FileSource
from petlbench.measure.clock import OTHER, PHASES
from petlbench.pipeline.plan.suite import expand, load_suite, suite_names
from petlbench.results.leaderboard import COLUMNS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NLVR = ROOT / "tests" / "fixtures" / "nlvr"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of each line of a shell block that calls `program`, comments taken off."""
    lines = [shlex.split(line, comments=True) for block in blocks(text, "sh") for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == [program]]


def parsed(arguments: list[str]) -> Namespace:
    return main._parser().parse_args(main._checked(arguments))


def cells_of(args: Namespace) -> list[Cell]:
    return expand(
        load_suite(args.suite),
        methods=args.methods,
        tasks=args.tasks,
        backbone=args.backbone,
        seeds=args.seeds,
        limit=args.limit,
        data_root=NLVR,
    )


@pytest.fixture
def my_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The YAML example under the name that the commands use, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(README, "yaml")
    path = Path("my.yaml")
    path.write_text(example, encoding="utf-8")
    return path


@pytest.fixture
def package(tmp_path: Path) -> tuple[Path, EntryPoint]:
    """The third-party package of CONTRIBUTING.md, written out, and its entry point."""
    (source,), (project,) = blocks(CONTRIBUTING, "python"), blocks(CONTRIBUTING, "toml")
    folder = tmp_path / "package"
    folder.mkdir()
    ((name, target),) = tomllib.loads(project)["project"]["entry-points"]["petlbench.methods"].items()
    point = EntryPoint(name, target, "petlbench.methods")
    (folder / f"{point.module}.py").write_text(source, encoding="utf-8")
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    return folder, point


@pytest.fixture
def scaling(package: tuple[Path, EntryPoint], monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    folder, point = package
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, point.module, raising=False)
    found = getattr(importlib.import_module(point.module), point.attr)
    assert issubclass(found, Method)
    return found


@pytest.fixture
def backbone() -> Tiny:
    torch.manual_seed(0)
    sizes = {"width": 32, "vision_width": 32, "ffn": 64, "vision_ffn": 64}
    layers = {"vision_layers": 1, "encoder_layers": 1, "decoder_layers": 1, "weights": "none"}
    return Tiny(TinyConfig(**sizes, **layers)).eval()


def logits(backbone: Backbone) -> Tensor:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    text = backbone.embed_text(backbone.texts(["the red nine"], max_length=16))
    memory = backbone.fuse(text, backbone.embed_image(backbone.images([image])), task="vqa")
    return backbone.decode(memory, torch.tensor([[backbone.start_id, 5, 6]]), task="vqa")[0]


def test_the_method_example_has_as_many_lines_as_its_heading_says() -> None:
    (promised,) = re.findall(r"^## Add a method in (\d+) lines$", CONTRIBUTING, re.MULTILINE)
    code = blocks(CONTRIBUTING, "python") + blocks(CONTRIBUTING, "toml")
    assert sum(bool(line.strip()) for block in code for line in block.splitlines()) == int(promised)


def test_the_method_example_starts_at_the_frozen_function_and_can_leave_it(
    scaling: type[Method], backbone: Tiny
) -> None:
    before = logits(backbone)
    adapted, handle = adapt(scaling(), backbone)
    assert torch.equal(logits(adapted), before)
    gains = [p for p in adapted.parameters() if p.requires_grad and p.shape == (backbone.width,) and not p.any()]
    with torch.no_grad():
        for gain in gains:
            gain.add_(0.1)
    assert not torch.allclose(logits(adapted), before)
    handle.restore()
    assert torch.equal(logits(backbone), before)


def test_the_method_example_trains_a_gain_at_every_sub_layer_and_gradient_reaches_each(
    scaling: type[Method], backbone: Tiny
) -> None:
    sublayers = sum(len(list(layer.items())) for role in backbone.roles() for layer in backbone.stack(role))
    adapted, _ = adapt(scaling(), backbone)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable.keys() - adapted.host_parameters()) == sublayers
    F.cross_entropy(logits(adapted)[0], torch.tensor([5, 6, 7])).backward()
    unreached = [name for name, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert unreached == []


@pytest.mark.slow
def test_the_method_example_installs_and_its_commands_end_well(
    package: tuple[Path, EntryPoint], tmp_path: Path
) -> None:
    folder, point = package
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--target", site, folder], check=True)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    for arguments in commands(CONTRIBUTING, "petlbench"):
        command = [sys.executable, "-m", "petlbench", *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert point.name in done.stdout


@pytest.mark.parametrize("base", [Method, Task, Source, Backbone])
def test_contributing_names_whatever_a_subclass_must_write(base: type) -> None:
    abstract: frozenset[str] = base.__abstractmethods__  # type: ignore[attr-defined]
    assert {name for name in abstract if f"`{name}`" not in CONTRIBUTING} == set()


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_command_parses(text: str) -> None:
    spans = [shlex.split(span)[1:] for span in re.findall(r"`(petlbench [a-z][^`\n]*)`", text)]
    lines = commands(text, "petlbench")
    assert lines
    for arguments in lines + [words for words in spans if "COMMAND" not in words]:
        parsed(arguments)


def test_every_command_of_the_cli_has_an_example() -> None:
    assert {arguments[0] for arguments in commands(README, "petlbench")} == set(main.COMMANDS)


@pytest.mark.parametrize("arguments", [a for a in commands(README, "petlbench") if a[0] == "run"], ids=" ".join)
def test_every_run_has_cells(arguments: list[str], my_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileSource, "check", lambda self: None)  # the reader has their files
    assert cells_of(parsed(arguments))


@pytest.mark.parametrize("arguments", [a for a in commands(README, "petlbench") if a[0] == "list"], ids=" ".join)
def test_every_listing_lists_something(arguments: list[str]) -> None:
    args = parsed(arguments)
    if args.kind == "records":
        assert any(fnmatchcase(spec.name, args.pattern) for spec in load_suite(args.results.name).methods)
    else:
        assert suite_names(args.pattern) if args.kind == "suites" else KINDS[args.kind].names(args.pattern)


def test_every_compared_method_is_in_the_suite_that_made_the_folder() -> None:
    for arguments in [words for words in commands(README, "petlbench") if words[0] == "compare"]:
        args = parsed(arguments)
        assert {args.a, args.b} <= {spec.label for spec in load_suite(args.results.name).methods} | {None}


def test_the_suite_example_makes_the_cells_that_it_names(my_suite: Path) -> None:
    suite = load_suite(my_suite)
    cells = expand(suite)
    assert len(cells) == len(suite.methods) * len(suite.tasks) * len(suite.seeds)
    chosen = {(cell.method, cell.variant, cell.task): cell for cell in cells}
    assert chosen["vl_adapter", "large", "captioning"].recipe.lr == 5e-4
    assert chosen["vl_adapter", "large", "captioning"].recipe.beams == 5
    assert chosen["vl_adapter", "large", "vqa"].recipe.beams == 1


def test_the_readme_explains_every_column_in_order() -> None:
    section = README.partition("## The columns of leaderboard.csv")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == COLUMNS


def test_the_readme_names_every_phase() -> None:
    (sentence,) = re.findall(r"\*\*Phases\*\*:(.*?) sum to the total", README, re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", sentence)) == (*PHASES, OTHER)


def test_the_readme_names_every_environment_variable_that_is_read() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "petlbench").rglob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", code))
    assert {name for name in read if f"`{name}`" not in README} == set()
    assert set(re.findall(r"`(PETLBENCH_\w+)`", README)) <= read


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_make_target_and_variable_exists(text: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    words = [word for arguments in commands(text, "make") for word in arguments]
    assert words
    for word in words:
        name, assigned, _ = word.partition("=")
        assert re.search(rf"^{name}\s*\?=" if assigned else rf"^{name}:", makefile, re.MULTILINE), word


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_file_that_is_named_exists(text: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    spans = re.findall(r"`((?:petlbench|tests|methods|tasks)/[\w./]*)`", text)
    assert [name for name in links + spans if not (ROOT / name).exists()] == []


def test_the_citation_agrees_with_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == petlbench.__version__
    assert re.search(rf"^license = {citation['license']}$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
