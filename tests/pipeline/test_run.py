"""`petlbench.run` works in a script without a main guard, twice in a process, and without any script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import petlbench
from petlbench.core.errors import UserError

SCRIPT = """
import json, petlbench
print("once")
first = petlbench.run({suite!r}, methods=["lora"], tasks=["vqa"], out={out!r})
again = petlbench.run({suite!r}, methods=["lora", "head_only"], tasks=["vqa"], out={out!r})
print(json.dumps([[r.cell.label, r.outcome, r.started] for r in first + again]))
"""
SUITE = """
methods: [lora, head_only]
tasks: [vqa]
backbones: [tiny]
dataset_configs: {digits: {train_scenes: 8, validation_scenes: 4, test_scenes: 4}}
recipe: {steps: 1, batch_size: 2, eval_batch_size: 4}
"""


@pytest.mark.slow
@pytest.mark.parametrize("as_file", [True, False], ids=["script", "notebook"])
def test_a_script_without_a_guard_runs_cells_twice(as_file: bool, tmp_path: Path) -> None:
    suite, script = tmp_path / "small.yaml", tmp_path / "script.py"
    suite.write_text(SUITE)
    code = SCRIPT.format(suite=str(suite), out=str(tmp_path / "out"))
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script) if as_file else "-"],
        input=None if as_file else code,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1, "a cell's process ran the script again"
    lora, lora_again, head_only = json.loads(done.stdout.splitlines()[-1])
    assert lora == lora_again and lora[:2] == ["lora on vqa:digits (tiny, seed 0)", "ok"]
    assert head_only[:2] == ["head_only on vqa:digits (tiny, seed 0)", "ok"]


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown suite 'smoek': did you mean 'smoke'"):
        petlbench.run("smoek", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_package_imports_nothing_before_it_is_used() -> None:
    code = "import petlbench, sys; assert not {'torch', 'pydantic', 'numpy'} & sys.modules.keys(); petlbench.UserError"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(dir(petlbench)) == set(petlbench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        petlbench.runn  # noqa: B018
