"""Third-party packages, built and installed by pip, plug in by entry points alone; a broken one disturbs no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.miniatures import picture

PLUGINS = Path(__file__).parents[1] / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with both plug-ins installed from wheels."""
    root = tmp_path_factory.mktemp("plugins")
    # Builds write files beside the sources, so build copies.
    sources = [shutil.copytree(PLUGINS / name, root / name) for name in ("example", "broken")]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", root / "wheels", *sources]
    subprocess.run([*pip, *wheel], check=True)
    wheels = sorted((root / "wheels").glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", root / "site", *wheels], check=True)
    return root / "site"


def petlbench(site: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "petlbench", *arguments]
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=site.parent)


@pytest.mark.parametrize(
    ("kind", "name", "target"),
    [("methods", "norm_gains", "NormGains"), ("tasks", "counting", "Counting"), ("datasets", "squares", "Squares")],
)
def test_a_plugin_is_listed_with_its_distribution(site: Path, kind: str, name: str, target: str) -> None:
    rows = {row["name"]: row for row in json.loads(petlbench(site, "list", kind, "--json").stdout)}
    assert rows[name]["distribution"] == "petlbench-plugin-example"
    assert rows[name]["target"] == f"petlbench_plugin_example:{target}"
    assert any(row["distribution"] == "petlbench" for row in rows.values())


def test_check_names_the_broken_plugin_and_only_it(site: Path) -> None:
    done = petlbench(site, "list", "methods", "--check", "--json")
    failures = {row["name"]: row["error"] for row in json.loads(done.stdout) if row["error"]}
    assert done.returncode == 1
    assert list(failures) == ["broken"]
    assert "petlbench_plugin_broken:Broken of distribution petlbench-plugin-broken" in failures["broken"]
    assert "RuntimeError: this plug-in is broken" in failures["broken"]


def test_a_run_with_the_broken_plugin_is_refused_in_one_line(site: Path) -> None:
    done = petlbench(site, "run", "smoke", "--methods", "norm_gains,broken", "--tasks", "counting")
    assert done.returncode == 2
    assert done.stderr.startswith("petlbench: error: method 'broken' (entry point petlbench_plugin_broken:Broken")
    assert done.stderr.count("\n") == 1


def test_a_plugins_method_task_and_data_set_make_a_cell(site: Path) -> None:
    done = petlbench(site, "run", "smoke", "--methods", "norm_gains", "--tasks", "counting", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["pending  norm_gains on counting:squares (tiny, seed 0)"]


PER_TASK = ("vl_adapter:multiple", "vl_adapter:half_shared_*", "compacter:multiple", "prompt:multiple",
            "lora:multiple", "hyperformer")  # fmt: skip


@pytest.mark.slow
def test_methods_with_modules_for_each_task_run_on_any_task(site: Path, tmp_path: Path) -> None:
    """Methods with a module for each task get the task's name, also that of a third party's task."""
    arguments = ["run", "smoke", "--methods", ",".join(PER_TASK), "--tasks", "pairs,counting", "--limit", "8"]
    done = petlbench(site, *arguments, "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")]
    assert len(records) == 2 * 7 and {record["outcome"] for record in records} == {"ok"}
    assert {record["cell"]["task"] for record in records} == {"pairs", "counting"}


@pytest.mark.slow
def test_a_plugins_cell_really_runs(site: Path, tmp_path: Path) -> None:
    arguments = ["run", "smoke", "--methods", "norm_gains", "--tasks", "counting", "--device", "cpu"]
    done = petlbench(site, *arguments, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")]
    assert record["outcome"] == "ok"
    assert record["cell"]["recipe"]["lr"] == 5e-3
    assert 0 <= record["metrics"]["accuracy"] <= 1


@pytest.fixture
def counted(tmp_path: Path) -> dict[str, str]:
    """Set the variables for the plug-in's data set, whose files exist except for one picture."""
    names = [f"{i:02}.png" for i in range(48)]
    for seed, name in enumerate(names):
        picture(tmp_path / "data" / "counts" / "images" / name, (48, 48), seed)
    parts = {"train": names[:40], "test": names[40:]}
    for part, own in parts.items():
        counts = {name: i % 4 + 1 for i, name in enumerate(own)}
        (tmp_path / "data" / "counts" / f"{part}.json").write_text(json.dumps({**counts, "none.png": 0}))
    (tmp_path / "data" / "counts" / "images" / names[40]).unlink()
    return {"PETLBENCH_DATA": str(tmp_path / "data"), "PETLBENCH_CACHE": str(tmp_path / "cache")}


def test_a_plugins_task_uses_the_file_machinery_with_columns_of_its_own(
    site: Path, counted: dict[str, str], tmp_path: Path
) -> None:
    check = ("data", "check", "counting:counted_files", "--all", "--json")
    done = petlbench(site, *check, **counted)
    assert done.returncode == 1, done.stderr
    (found,) = json.loads(done.stdout)
    entries = {entry["name"]: entry for entry in found["entries"] if not entry["made_of"]}
    assert entries["train"]["counts"] == {"images": 40, "scenes": 40}
    assert entries["train"]["left_out"] == {"not from 1 to 4 squares": 1}
    assert list(entries["test"]["faults"]) == [f"{counted['PETLBENCH_DATA']}/counts/images/40.png"]
    tables = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "tables").iterdir()}
    again = petlbench(site, *check, "--config", '{"skip_broken": false}', **counted)
    assert json.loads(again.stdout) == json.loads(done.stdout)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "tables").iterdir()} == tables, "kept"
    sheet = ("data", "show", "counting:counted_files", "--split", "train", "--out", str(tmp_path / "sheet.png"))
    assert petlbench(site, *sheet, **counted).returncode == 0
    assert (tmp_path / "sheet.png").stat().st_size


@pytest.mark.slow
def test_a_plugins_task_runs_on_its_data_set_of_files(site: Path, counted: dict[str, str], tmp_path: Path) -> None:
    suite = {
        "name": "counts",
        "methods": ["norm_gains"],
        "tasks": ["counting:counted_files"],
        "backbones": ["tiny"],
        "recipe": {"steps": 3, "batch_size": 4, "train_limit": 8},
    }
    run = ("run", str(tmp_path / "counts.yaml"), "--device", "cpu", "--out", str(tmp_path / "out"))
    (tmp_path / "counts.yaml").write_text(json.dumps(suite))
    refused = petlbench(site, *run, **counted)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "skip_broken" in refused.stderr
    suite["dataset_configs"] = {"counted_files": {"skip_broken": True}}
    (tmp_path / "counts.yaml").write_text(json.dumps(suite))
    done = petlbench(site, *run, **counted)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").glob("*.json")]
    assert (record["outcome"], record["cell"]["dataset"]) == ("ok", "counted_files")
    assert any("skipped: 1 images of counted_files, test" in note for note in record["notes"])
