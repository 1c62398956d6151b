"""Check the limits of a cell's process, and the last lines of its log."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from petlbench.pipeline.launch.watch import Limits, Watch, fair_share, last_lines, machine_memory


def test_time_counts_from_the_beginning_of_the_cell() -> None:
    watch = Watch(os.getpid(), Limits(timeout=1.0, memory_limit=2**60))
    assert watch.passed() is None, "it has not begun"
    watch.begun = time.monotonic()
    assert watch.passed() is None
    watch.begun -= 1.0
    assert watch.passed() == ("timeout", "took longer than the timeout of 1 s")
    assert Watch(os.getpid(), Limits(None, 2**60), begun=0.0).passed() is None


def test_memory_is_that_of_the_process_and_its_descendants() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        family, alone = Watch(os.getpid(), Limits(None, 2**60)), Watch(child.pid, Limits(None, 2**60))
        assert family.resident_bytes() > alone.resident_bytes() > 0
        assert family.resident_bytes() > psutil.Process().memory_info().rss * 0.9 + alone.resident_bytes() * 0.5
        child.communicate(b"\n")
    assert alone.resident_bytes() == 0, "ended meanwhile"


def test_the_reason_of_a_process_past_its_memory_names_both_figures() -> None:
    outcome, reason = Watch(os.getpid(), Limits(None, 2**20)).passed() or ("", "")
    assert outcome == "oom"
    assert reason.endswith("iB passed the memory_limit of 1 MiB")


@pytest.mark.parametrize(
    ("table", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "5000", "a/memory.max": "4000"}, 4000),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "max"}, None),
        ("0::/outside\n", {"memory.max": "3000"}, 3000),
        ("4:cpu,memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "2000"}, 2000),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "1", "a/memory.max": "1"}, None),
        (None, {"memory.max": "1"}, None),
    ],
)
def test_the_limit_of_a_control_group_counts(
    tmp_path: Path, table: str | None, files: dict[str, str], expected: int | None
) -> None:
    for name, content in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    if table is not None:
        (tmp_path / "table").write_text(table)
    memory = machine_memory(tmp_path / "table", tmp_path / "fs")
    assert memory == (psutil.virtual_memory().total if expected is None else expected)


def test_cells_share_most_of_the_memory() -> None:
    assert fair_share(3) * 3 == pytest.approx(0.9 * machine_memory(), rel=1e-6)


def test_last_lines_are_few_short_and_clean(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(log) == ()
    log.write_bytes(b"".join(b"%d\n" % n for n in range(100_000)))
    assert last_lines(log) == tuple(map(str, range(99_980, 100_000)))
    log.write_bytes(
        b"old\n\x1b[31mred\x1b[0m\t\x07bell\n\n \nnot \xff UTF-8\r\n 1%\r 2%\n\x1b]0;title\x07" + b"x" * 600
    )
    assert last_lines(log, start=4) == ("red     bell", "not \ufffd UTF-8", " 2%", "x" * 500)
