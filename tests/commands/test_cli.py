"""The command line: exit statuses, one-line errors, and the cells that a run executes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from petlbench import __version__
from petlbench.api.registries import METHODS
from petlbench.commands import main
from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.recipe import Outcome
from petlbench.core.record import Record
from petlbench.measure import environment
from petlbench.pipeline.fingerprint import fingerprints
from petlbench.pipeline.launch.claims import claim_cell
from petlbench.pipeline.options import RunOptions
from petlbench.results.store import Store

CELLS = [Cell(method=method, task="rec", dataset="digits", backbone="tiny") for method in ("full", "lora")]


def petlbench(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "petlbench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


class Launcher:
    """A stand-in for `run_cells` that saves records with a given outcome."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.ran: list[str] = []
        self.changes: dict[str, str] = {}  # to the fingerprints, as if the code differed

    def __call__(self, cells: list[Cell], store: Store, options: RunOptions, **more: Any) -> list[Record]:
        self.ran = [cell.method for cell in cells]
        self.options, self.more = options, more
        return [store.save(self.record(cell)) for cell in cells]

    def record(self, cell: Cell) -> Record:
        outcome = self.outcomes.get(cell.method, "ok")
        metrics = {"acc_50": 0.5} if outcome == "ok" else {}
        known = {**fingerprints(cell), **self.changes}
        return Record(
            cell=cell, outcome=outcome, reason="no luck", main_metric="acc_50", metrics=metrics, fingerprints=known
        )


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """Two cells without a model, run in an empty folder."""
    launcher = Launcher()
    monkeypatch.setattr("petlbench.pipeline.run.expand", lambda suite, **filters: CELLS)
    monkeypatch.setattr("petlbench.pipeline.run.run_cells", launcher)
    monkeypatch.setattr("petlbench.pipeline.launch.process.server_beside", nullcontext)
    monkeypatch.chdir(tmp_path)
    return launcher


def test_listing_imports_neither_torch_nor_pandas() -> None:
    script = (
        "import sys; from petlbench.commands.main import main; assert main(['list', 'methods']) == 0; "
        "sys.exit(', '.join({'torch', 'pandas', 'rich', 'transformers', 'datasets'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lora  " in done.stdout


def test_listing_as_json_with_a_wildcard(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list", "methods", "lo*", "--json"]) == 0
    target = "petlbench.methods.lora:LoRA"
    assert {"name": "lora", "distribution": "petlbench", "target": target} in json.loads(capsys.readouterr().out)


def test_check_names_what_fails_and_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(name: str) -> type:
        if name == "lora":
            raise UserError("is broken")
        return object

    monkeypatch.setattr(METHODS, "get", get)
    assert main.main(["list", "methods", "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "FAILS" in line] == ["  FAILS: is broken"]
    assert lines[lines.index("  FAILS: is broken") - 1].startswith("lora ")
    assert main.main(["list", "methods", "f*", "--check"]) == 0


def test_packaged_suites_are_listed_with_their_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list", "suites"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "curves",
        "quick",
        "smoke",
        "standard",
    ]


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("commit", "dirty", "shown"),
    [
        (None, None, __version__),
        (COMMIT, False, f"{__version__} (commit 0123456789ab)"),
        (COMMIT, True, f"{__version__} (commit 0123456789ab, modified)"),
        (COMMIT, None, f"{__version__} (commit 0123456789ab)"),
    ],
)
def test_the_version_names_the_commit_of_a_checkout(
    commit: str | None,
    dirty: bool | None,
    shown: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "source_tree", lambda: {"git_commit": commit, "git_dirty": dirty})
    with pytest.raises(SystemExit, match="0"):
        main.main(["--version"])
    assert capsys.readouterr().out.strip() == shown


def test_a_mistyped_method_exits_with_2_and_writes_nothing(tmp_path: Path) -> None:
    done = petlbench("run", "quick", "--methods", "lroa", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "petlbench: error: unknown method 'lroa': did you mean 'lora'? `petlbench list methods` shows all\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "unknown command 'rnu': did you mean 'run'?"),
        (["run", "--jobs", "0"], "argument --jobs: a positive whole number is needed, not '0'"),
        (["run", "--seeds", "0,x"], "argument --seeds: comma-separated whole numbers are needed, not '0,x'"),
        (["run", "--seeds", "0,1,0"], "argument --seeds: a seed is given more than once: 0,1,0"),
        (["run", "--timeout", "0"], "argument --timeout: a cell needs more than zero seconds"),
        (["run", "--timeout", "nan"], "argument --timeout: a number of seconds is needed, not 'nan'"),
        (["run", "--memory-limit", "lots"], "argument --memory-limit: a size such as 4 GiB or 800 MB is needed"),
        (["check", "lroa"], "unknown method 'lroa': did you mean 'lora'?"),
        (["check", "lora", "--config", "{"], "--config is not JSON"),
        (["check", "lora", "--config", "[]"], "--config must be a JSON object"),
        (["profile", "--methods", "lroa"], "unknown method 'lroa': did you mean 'lora'?"),
        (["compare", "nowhere", "lora"], "compare needs two methods, or none for all pairs: add one beside lora"),
        (["repair", "nowhere"], "no results folder at nowhere"),
        (["run", "--methods", ","], "argument --methods: a comma-separated list of names is needed"),
        (["run", "qick"], "unknown suite 'qick': did you mean 'quick'?"),
        (["leaderboard", "nowhere"], "no results folder at nowhere"),
        (["run", "--backbone", "clipp:tiny", "--dry-run"], "unknown backbone 'clipp': did you mean 'clip'?"),
        (["run", "--backbone", "clip:ViT-B-61", "--dry-run"], "open_clip has no model 'ViT-B-61': did you mean 'ViT-B"),
        (["run", "--backbone", "beit3:bse-224", "--dry-run"], "BEiT3 has no size 'bse-224': did you mean 'base-224'?"),
        (
            ["run", "--backbone", "transvg:tiny", "--tasks", "retrieval", "--dry-run"],
            "suite 'quick': backbone 'transvg:tiny' cannot serve task 'retrieval': it cannot embed (image and text",
        ),
        (["profile", "--methods", "lora", "--backbone", "clip:tniy"], "open_clip has no model 'tniy': did you mean"),
        (["verify", "pubished"], "argument figures: invalid choice: 'pubished'"),
        (["verify", "published", "--methods", "lroa"], "unknown method 'lroa': did you mean 'lora'?"),
        (["list", "tasks", "--matrix"], "--matrix works with backbones only: `petlbench list backbones --matrix`"),
        (["list", "backbones", "clipp"], "no backbone matches 'clipp': did you mean 'clip'?"),
        (["list", "methds"], "argument kind: invalid choice: 'methds'"),
        ([], "the following arguments are required"),
    ],
)
def test_mistakes_exit_with_2_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"petlbench: error: {message}")
    assert error.count("\n") == 1


def test_a_closed_pipe_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "petlbench", "list", "methods"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


def test_a_run_leaves_records_table_and_plots(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "smoke", "--jobs", "2", "--device", "cpu"]) == 0
    assert launcher.ran == ["full", "lora"]
    assert launcher.options == RunOptions(device="cpu", jobs=2)
    done, known = launcher.more["done"], launcher.more["fingerprints"]
    assert done(CELLS[0]) == Store(Path("runs/smoke")).get(CELLS[0]) and known[CELLS[0].id] == fingerprints(CELLS[0])
    out = Path("runs/smoke")
    assert len(list((out / "records").glob("*.json"))) == 2
    assert (out / "leaderboard.csv").read_text().count("\n") == 3
    assert (out / "plots").is_dir()
    printed = capsys.readouterr().out
    assert "smoke: 2 cells, 0 done, 2 to run; results in runs/smoke" in printed
    assert "lora" in printed


def test_a_second_run_runs_only_what_is_not_done(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    Store.open("out", create=True).save(launcher.record(CELLS[0]))
    assert main.main(["run", "smoke", "--out", "out", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "done     full on rec:digits (tiny, seed 0)",
        "pending  lora on rec:digits (tiny, seed 0)",
    ]
    assert main.main(["run", "smoke", "--out", "out"]) == 0
    assert launcher.ran == ["lora"]


def test_failed_cells_count_as_done_unless_they_are_retried(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.outcomes = {"lora": "diverged"}
    assert main.main(["run", "smoke"]) == 1
    assert "diverged: lora on rec:digits (tiny, seed 0): no luck\n1 of 2 cells" in capsys.readouterr().err
    launcher.ran, launcher.outcomes = [], {}
    assert main.main(["run", "smoke"]) == 1
    assert launcher.ran == []
    assert main.main(["run", "smoke", "--retry-failed"]) == 0
    assert launcher.ran == ["lora"]


def test_a_record_of_other_code_is_stale_and_made_anew(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open("out", create=True)
    store.save(launcher.record(CELLS[0]))
    launcher.changes = {"method": "another", "metric": "another"}
    store.save(launcher.record(CELLS[1]))
    assert main.main(["run", "smoke", "--out", "out", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "smoke: 2 cells, 1 done, 1 stale, 1 to run; results in out",
        "done                    full on rec:digits (tiny, seed 0)",
        "stale (method, metric)  lora on rec:digits (tiny, seed 0)",
    ]
    assert main.main(["list", "records", "--results", "out"]) == 0
    assert [line.split(maxsplit=7)[7] for line in capsys.readouterr().out.splitlines()] == [
        "0.500  done",
        "0.500  stale (method, metric)",
    ]
    assert main.main(["leaderboard", "out"]) == 0
    assert "stale: method, metric" in capsys.readouterr().out
    assert main.main(["run", "smoke", "--out", "out", "--keep-stale"]) == 0
    assert launcher.ran == []
    launcher.changes = {}
    assert main.main(["run", "smoke", "--out", "out"]) == 0
    assert launcher.ran == ["lora"]


def test_a_failed_cell_whose_code_has_changed_is_run_again(launcher: Launcher) -> None:
    launcher.outcomes, launcher.changes = {"lora": "failed"}, {"method": "another"}
    store = Store.open("out", create=True)
    for cell in CELLS:
        store.save(launcher.record(cell))
    launcher.outcomes, launcher.changes = {}, {}
    assert main.main(["run", "smoke", "--out", "out"]) == 0
    assert launcher.ran == ["full", "lora"]


def test_a_run_without_a_single_score_still_leaves_its_table(launcher: Launcher) -> None:
    launcher.outcomes = {"full": "failed", "lora": "oom"}
    assert main.main(["run", "smoke"]) == 1
    assert "oom" in Path("runs/smoke/leaderboard.csv").read_text()


def test_a_dry_run_writes_nothing(launcher: Launcher) -> None:
    assert main.main(["run", "smoke", "--dry-run"]) == 0
    assert launcher.ran == []
    assert list(Path().iterdir()) == []


def test_an_interrupted_run_exits_with_130_and_says_how_to_continue(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("petlbench.pipeline.run.run_cells", interrupted)
    assert main.main(["run", "smoke"]) == 130
    error = capsys.readouterr().err
    assert "run the same command to continue" in error
    assert error.count("\n") == 1


def test_cuda_without_a_cuda_device_is_refused_before_anything_is_written(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main.main(["run", "smoke", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("petlbench: error: --device cuda: torch sees no CUDA device")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["leaderboard", "out", "--csv", "table.csv"], lambda: Path("table.csv").is_file()),
        (["plot", "out", "--out", "figures"], lambda: any(Path("figures").iterdir())),
    ],
)
def test_results_can_be_shown_again(launcher: Launcher, arguments: list[str], written: Callable[[], bool]) -> None:
    store = Store.open("out", create=True)
    for cell in CELLS:
        store.save(launcher.record(cell))
    assert main.main(arguments) == 0
    assert written()


def test_two_methods_are_compared_on_their_samples(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open("out", create=True)
    for cell, scores in zip(CELLS, ([1.0, 1.0], [0.0, 0.0]), strict=True):
        samples = {"metric": "acc_50", "sample_ids": ["a", "b"], "scores": {"acc_50": scores}, "predictions": [0, 0]}
        store.save(launcher.record(cell), samples)
    assert main.main(["compare", "out", "full", "lora"]) == 0
    assert "1.0" in capsys.readouterr().out
    assert main.main(["compare", "out", "full", "lroa"]) == 2
    assert "did you mean lora" in capsys.readouterr().err
    assert main.main(["compare", "out", "--csv", "pairs.csv"]) == 0
    assert Path("pairs.csv").read_text().splitlines()[1].startswith("rec,digits,tiny,full,lora,acc_50,1.0,0.0,1.0,")


def test_what_cannot_be_read_is_named_and_repair_sets_it_aside(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.open("out", create=True)
    for cell in CELLS:
        store.save(launcher.record(cell))
    half = store.records / f"{CELLS[0].id}.json"
    half.write_text(half.read_text()[:200])
    assert main.main(["leaderboard", "out"]) == 2
    error = capsys.readouterr().err
    assert half.name in error and "petlbench repair out" in error and error.count("\n") == 1
    assert main.main(["repair", "out"]) == 0
    assert half.name in capsys.readouterr().out and (Path("out/set-aside/records") / half.name).exists()
    assert main.main(["leaderboard", "out"]) == 0
    assert main.main(["repair", "out"]) == 0
    assert capsys.readouterr().out.endswith("out: nothing to repair\n")


def test_a_folder_in_which_a_run_is_at_work_is_not_repaired(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.open("out", create=True)
    claim = claim_cell(store.claims / "cell.lock")
    assert claim and main.main(["repair", "out"]) == 2
    assert "a run is active in out" in capsys.readouterr().err
    claim.release()
    assert main.main(["repair", "out"]) == 0


def test_a_profile_counts_without_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["profile", "--methods", "full,lora", "--meta", "--json"]) == 0
    found = {cost["method"]: cost["parameters"] for cost in json.loads(capsys.readouterr().out)}
    assert found["full"]["percent"] == 100.0 and found["lora"]["inference_extra"] == 0


def test_a_profile_takes_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["profile", "--methods", "full", "--backbone", "clip:ViT-B-16", "--task", "retrieval", "--meta"]
    assert main.main([*arguments, "--json"]) == 0
    (cost,) = json.loads(capsys.readouterr().out)
    assert cost["parameters"]["trainable"] == 149_620_737


def test_an_option_that_a_backbone_does_not_have_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text(
        "methods: [head_only]\ntasks: [retrieval]\nbackbones: [{name: 'clip:tiny', config: {haeds: frozen}}]\n"
    )
    assert main.main(["run", str(suite), "--dry-run"]) == 2
    error = capsys.readouterr().err
    where = "suite 'mine': backbone clip:tiny: config: haeds: unknown key: did you mean 'heads'?"
    assert error == f"petlbench: error: {where}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "task"),
    [("clip", "retrieval"), ("beit3", "retrieval"), ("transvg", "rec"), ("vl_bart", "vqa"), ("vl_t5", "captioning")],
)
def test_every_family_really_runs(backbone: str, task: str, tmp_path: Path) -> None:
    suite = tmp_path / "few.yaml"
    recipe = "{steps: 2, batch_size: 4, eval_batch_size: 4}"
    suite.write_text(f"methods: [full]\ntasks: [{task}]\nbackbones: [tiny]\nrecipe: {recipe}\n")
    arguments = ["--backbone", f"{backbone}:tiny", "--limit", "8", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = petlbench("run", str(suite), *arguments)
    assert done.returncode == 0, done.stderr
    (record,) = Store.open(tmp_path / "out", create=False).load()
    assert (record.outcome, record.cell.backbone) == ("ok", f"{backbone}:tiny")


def test_a_method_is_held_to_its_claims(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path))
    assert main.main(["check", "tests.broken_methods:Gains", "--tasks", "rec", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    outcomes = [finding["outcome"] for finding in report["findings"]["rec"]]
    assert len(outcomes) == 13 and outcomes.count("pass") >= 8 and "fail" not in outcomes
