"""Each benchmark runs as documented, at toy size; these tests ignore its measurements."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests" / "benchmarks").glob("*.py"))
PROGRAMS = [path.stem for path in FILES if "__main__" in path.read_text(encoding="utf-8")]
COLLECTED = [path.name for path in FILES if re.search(r"^def test_", path.read_text(encoding="utf-8"), re.MULTILINE)]


def output_of(*command: str) -> str:
    """Run a command from the repository's root and return its output."""
    # The current folder is not always on sys.path: PYTHONSAFEPATH keeps it off.
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    # Run by a worker, pytest-benchmark would take its child for one too, and measure nothing.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**inherited, "TOY": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_is_run_by_one_of_these() -> None:
    helpers = {"__init__.py", "inline.py"}
    assert {f"{name}.py" for name in PROGRAMS} | set(COLLECTED) == {path.name for path in FILES} - helpers


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_runs_by_itself(name: str) -> None:
    module = f"tests.benchmarks.{name}"
    assert f"python -m {module}" in (ROOT / "tests" / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    assert re.search(r"\d\.\d\d", output_of(sys.executable, "-m", module))


@pytest.mark.slow
def test_make_microbench_runs_all_that_pytest_collects(tmp_path: Path) -> None:
    arguments = f"-rA --basetemp={tmp_path / 'tests'} -p no:cacheprovider"
    output = output_of("make", "microbench", "READY=", f"RUN={sys.executable}", "TOY=1", f"PYTEST_ARGS={arguments}")
    passed = set(re.findall(r"^PASSED tests/benchmarks/(\w+\.py)::", output, re.MULTILINE))
    assert passed == set(COLLECTED)
    assert re.search(r"^\d+ passed", output, re.MULTILINE)
