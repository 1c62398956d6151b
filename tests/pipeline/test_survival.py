"""A run that is killed again and again, with all its processes, ends with the records of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from petlbench.results.store import Store

SUITE: dict[str, Any] = {
    "name": "short",
    "methods": ["lora", "bitfit"],
    "tasks": ["vqa"],
    "backbones": ["tiny"],
    "recipe": {"steps": 30, "batch_size": 4, "eval_batch_size": 8, "validations": 3, "lr_factors": [0.5, 1]},
    "dataset_configs": {"digits": {"train_scenes": 24, "validation_scenes": 12, "test_scenes": 12}},
}
KILLS = 4
RESULT = ("cell", "outcome", "metrics", "validation", "trials", "chosen_lr", "parameters", "flops", "fingerprints")


def start(suite: Path, out: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "petlbench", "run", str(suite), "--out", str(out)]
    options = ["--device", "cpu", "--threads", "1", "--checkpoint-seconds", "0"]
    environ = {**os.environ, "PETLBENCH_CACHE": str(cache)}
    return subprocess.Popen(
        command + options,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(suite: Path, out: Path, cache: Path) -> str:
    process = start(suite, out, cache)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def kill_while_a_cell_runs(suite: Path, out: Path, cache: Path, chance: random.Random) -> None:
    process = start(suite, out, cache)
    assert process.stdout
    for line in process.stdout:
        if line.rstrip().endswith("started"):
            break
    time.sleep(chance.uniform(0.0, 2.5))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_records_of_an_undisturbed_one(tmp_path: Path) -> None:
    suite, cache = tmp_path / "short.yaml", tmp_path / "cache"
    suite.write_text(yaml.safe_dump(SUITE))
    finish(suite, tmp_path / "whole", cache)
    chance = random.Random(0)
    for _ in range(KILLS):
        kill_while_a_cell_runs(suite, tmp_path / "cut", cache, chance)
    finish(suite, tmp_path / "cut", cache)
    whole, cut = (Store.open(tmp_path / name, create=False) for name in ("whole", "cut"))
    assert len(whole.load()) == 2
    for one, other in zip(whole.load(), cut.load(), strict=True):
        for name in RESULT:
            assert getattr(one, name) == getattr(other, name), name
        assert whole.samples(one) == cut.samples(other)
        stored = [store.adapters / f"{one.cell.id}.safetensors" for store in (whole, cut)]
        assert stored[0].read_bytes() == stored[1].read_bytes()
    assert not list(cut.checkpoints.iterdir())
