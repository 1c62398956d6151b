"""The documents hold: their commands parse, their examples run, their tables are complete."""

from __future__ import annotations

import ast
import csv
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from argparse import Namespace
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from site_pages import command_line
from site_pages.generated import GENERATED, MARKER
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
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in zip(NAMES, PAGES, strict=True)}
README, METHOD, COMMANDS = (TEXTS[name] for name in ("README.md", "docs/extending/method.md", "docs/command-line.md"))
# Pages whose commands run something of petlbench's own; the method of the other one is not installed.
RUNS = [
    pytest.param(words, id=" ".join(words))
    for words in dict.fromkeys(
        tuple(shlex.split(line, comments=True)[1:])
        for name, text in TEXTS.items()
        if text is not METHOD
        for line in re.findall(r"^ *(petlbench run .*)$", text, re.MULTILINE)
    )
]
NLVR = ROOT / "tests" / "fixtures" / "nlvr"


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


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
    (example,) = blocks(TEXTS["docs/suites.md"], "yaml")
    path = Path("my.yaml")
    path.write_text(example, encoding="utf-8")
    return path


@pytest.fixture
def package(tmp_path: Path) -> tuple[Path, EntryPoint]:
    """The third-party package of the page on methods, written out, and its entry point."""
    (source,), (project,) = blocks(METHOD, "python"), blocks(METHOD, "toml")
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
    (promised,) = re.findall(r"^## Add a method in (\d+) lines$", METHOD, re.MULTILINE)
    code = blocks(METHOD, "python") + blocks(METHOD, "toml")
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
    for arguments in commands(METHOD, "petlbench"):
        command = [sys.executable, "-m", "petlbench", *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert point.name in done.stdout


@pytest.mark.parametrize(
    ("base", "page"), [(Method, "method"), (Task, "task"), (Source, "dataset"), (Backbone, "backbone")]
)
def test_each_page_on_extending_names_whatever_a_subclass_must_write(base: type, page: str) -> None:
    abstract: frozenset[str] = base.__abstractmethods__  # type: ignore[attr-defined]
    assert {name for name in abstract if f"`{name}`" not in TEXTS[f"docs/extending/{page}.md"]} == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses(name: str) -> None:
    text = TEXTS[name]
    spans = [shlex.split(span)[1:] for span in re.findall(r"`(petlbench [a-z][^`\n]*)`", text)]
    bare = [verb.split() for verb in main.VERBS] + [[group] for group in main.GROUPS]
    for arguments in commands(text, "petlbench") + [words for words in spans if words not in bare]:
        if arguments[0].startswith("-"):
            assert arguments == ["--version"]
        else:
            parsed(arguments)


def test_every_command_of_the_cli_has_an_example() -> None:
    assert {arguments[0] for arguments in commands(COMMANDS, "petlbench")} == set(main.COMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_that_is_named_exists(name: str) -> None:
    options = {
        option
        for verb in main.VERBS
        for action in command_line.parser_of(verb)._actions
        for option in action.option_strings
    }
    named = set(re.findall(r"`(--[a-z-]+)", TEXTS[name]))
    assert named <= options | {"--version", "--help"}


@pytest.mark.parametrize("arguments", RUNS)
def test_every_run_has_cells(arguments: tuple[str, ...], my_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileSource, "check", lambda self: None)  # the reader has their files
    assert cells_of(parsed(list(arguments)))


@pytest.mark.parametrize("arguments", [a for a in commands(COMMANDS, "petlbench") if a[0] == "list"], ids=" ".join)
def test_every_listing_lists_something(arguments: list[str]) -> None:
    args = parsed(arguments)
    if args.kind == "records":
        assert any(fnmatchcase(spec.name, args.pattern) for spec in load_suite(args.results.name).methods)
    else:
        assert suite_names(args.pattern) if args.kind == "suites" else KINDS[args.kind].names(args.pattern)


def test_every_compared_method_is_in_the_suite_that_made_the_folder() -> None:
    for arguments in [words for words in commands(COMMANDS, "petlbench") if words[0] == "compare"]:
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


def test_the_page_of_records_explains_every_column_in_order() -> None:
    section = TEXTS["docs/records.md"].partition("## The columns of leaderboard.csv")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == tuple(COLUMNS)


def test_the_page_of_measuring_names_every_phase() -> None:
    (sentence,) = re.findall(r"\*\*Phases\*\*:(.*?) sum to the total", TEXTS["docs/measuring.md"], re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", sentence)) == (*PHASES, OTHER)


def test_the_documents_name_every_environment_variable_that_is_read() -> None:
    documents = "".join(TEXTS.values())
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "petlbench").rglob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", code))
    assert {name for name in read if f"`{name}`" not in documents} == set()
    assert set(re.findall(r"`(PETLBENCH_\w+)`", documents)) <= read


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_and_variable_exists(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    spans = [shlex.split(span)[1:] for span in re.findall(r"`(make [^`\n]+)`", TEXTS[name])]
    for word in [word for arguments in commands(TEXTS[name], "make") + spans for word in arguments]:
        variable, assigned, _ = word.partition("=")
        rule = rf"^{variable}\s*\?=" if assigned else rf"^{re.sub('installed-.*', 'installed-%', word)}:"
        assert re.search(rule, makefile, re.MULTILINE), word


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^):]+)\)", TEXTS[name]):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}, target


@pytest.mark.parametrize("name", NAMES)
def test_every_file_and_name_of_the_code_that_is_named_exists(name: str) -> None:
    spans = re.findall(r"`((?:petlbench|tests|methods|tasks|results|docs)/[\w./-]*)`", TEXTS[name])
    assert [span for span in spans if not (ROOT / span).exists()] == []
    dotted = re.findall(r"`(petlbench(?:\.\w+)+)", TEXTS[name]) + re.findall(r"^::: (\S+)$", TEXTS[name], re.MULTILINE)
    groups = entry_points().groups
    assert [one for one in dotted if one not in groups and not resolves(one)] == []


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or what stands in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute, None)
        return found is not None
    return False


EXAMPLES = [
    pytest.param(block, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, block in enumerate(blocks(text, "python"))
]


@pytest.mark.parametrize("block", EXAMPLES)
def test_every_python_example_compiles_and_its_imports_and_arguments_exist(block: str) -> None:
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("petlbench"):
            assert [alias.name for alias in node.names if not resolves(f"{node.module}.{alias.name}")] == []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "petlbench.run":
            keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            inspect.signature(petlbench.run).bind(*map(ast.literal_eval, node.args), **keywords)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_in_yaml_and_toml_parses(name: str) -> None:
    for block in blocks(TEXTS[name], "yaml"):
        assert yaml.safe_load(block)
    for block in blocks(TEXTS[name], "toml"):
        assert tomllib.loads(block)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


SCORES = re.compile(
    r"^\| (\w+), (\w+) \| (\w+) \| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \|.*?\| ([\d,]+) \(",
    re.MULTILINE,
)


@pytest.mark.parametrize(("name", "rows"), [("README.md", 8), ("docs/reference-results.md", 32)])
def test_every_printed_score_is_in_the_results_that_the_page_names(name: str, rows: int) -> None:
    (folder,) = set(re.findall(r"results/(quick_[\w.-]+?)[/`]", TEXTS[name]))
    with (ROOT / "results" / folder / "leaderboard.csv").open(encoding="utf-8") as file:
        held = {(row["task"], row["method"]): row for row in csv.DictReader(file)}
    printed = SCORES.findall(TEXTS[name])
    assert len(printed) == rows
    for task, metric, method, mean, low, high, parameters in printed:
        row = held[task, method]
        assert row["metric"] == metric
        shown = [f"{float(row[key]):.3f}" for key in ("score_mean", "score_low", "score_high")]
        assert (shown, int(row["trainable_params"])) == ([mean, low, high], int(parameters.replace(",", "")))


@pytest.mark.parametrize("name", ["README.md", "docs/reference-results.md"])
def test_a_page_with_results_names_their_commit_machine_and_command(name: str) -> None:
    results = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    (commit,) = set(re.findall(r"^\| commit \| (\w+)", results, re.MULTILINE))
    assert commit[:7] in TEXTS[name]
    assert "2 cores of an AMD EPYC" in TEXTS[name]
    assert "`make bench`" in TEXTS[name]


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    (navigation,) = re.findall(r"^nav:\n(.*)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M | re.S)
    assert sorted(re.findall(r"[\w/-]+\.md", navigation)) == sorted(
        name.removeprefix("docs/") for name in NAMES if name.startswith("docs/")
    )


def test_everything_that_pages_want_generated_is_generated_and_the_other_way_round() -> None:
    wanted = [name for text in TEXTS.values() for name in MARKER.findall(text)]
    assert sorted(wanted) == sorted(GENERATED)


def test_the_changelog_has_the_version_and_its_new_names_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(petlbench.__version__)}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE)
    rows = re.findall(r"^\| `\w+` \| `(\w+)` \| `(petlbench\.[\w.]+)` \|$", text, re.MULTILINE)
    assert len(rows) > 80
    assert [row for row in rows if not resolves(f"{row[1]}.{row[0]}")] == []


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"], ids=lambda path: path.name
)
def test_templates_and_hooks_are_yaml(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_citation_agrees_with_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    required = {"cff-version", "message", "title", "authors", "version", "date-released"}
    assert required <= citation.keys()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{citation['version']}] - {citation['date-released']}" in changelog
    assert citation["version"] == petlbench.__version__
    assert re.search(rf"^license = {citation['license']}$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
