"""Stand-ins for the function that runs a cell; a cell's process imports this module by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Any

import psutil

from petlbench.core.cell import Cell
from petlbench.core.errors import Unwritable
from petlbench.core.record import Record
from petlbench.pipeline.options import RunOptions
from petlbench.results.store import Store

Report = Callable[[Any], None]
STARTED_WITH = frozenset(sys.modules)  # this module is imported in a cell's process, after the server's imports


def ok(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    report({"cell": cell.id, "phase": "train", "step": 1, "steps": 2, "score": 0.25, "loss": 1.5})
    record = Record(cell=cell, outcome="ok", main_metric="acc", metrics={"acc": 0.5})
    Store.open(store_root, create=False).save(record)
    return record.model_copy(update={"environment": {**vars(options), **more}})


def probe(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    """Record the state of the process before it has done anything."""
    torch = sys.modules["torch"]
    found = {
        "modules": STARTED_WITH,
        "server": os.getppid(),
        "process": os.getpid(),
        "cuda_initialized": torch.cuda.is_initialized(),
        "cuda_lost_by_fork": torch.cuda._is_in_bad_fork(),
        "torch_threads": torch.get_num_threads(),
        "omp_threads": os.environ["OMP_NUM_THREADS"],
        "variable": os.environ.get("PETLBENCH_TEST_VARIABLE"),
        "resident_bytes": psutil.Process().memory_info().rss,
        "ignores_interrupts": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    }
    return Record(cell=cell, outcome="ok", environment=found)


def by_seed(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    """Succeed for seed 0; fail in a different way for each other seed."""
    if cell.seed == 1:
        raise RuntimeError("no such thing")
    if cell.seed == 2:
        os._exit(7)
    if cell.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return ok(cell, store_root, options, report=report, **more)


def killed_after_its_record(
    cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any
) -> Record:
    util.Finalize(None, os.kill, (os.getpid(), signal.SIGKILL), exitpriority=1)  # runs when the process exits
    return ok(cell, store_root, options, report=report, **more)


def endless(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    """Work until a signal ends the process; an odd seed ignores SIGTERM. Remove the temporary file if possible."""
    if cell.seed % 2:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    temporary = store_root / f"{cell.seed}.tmp"
    temporary.touch()
    try:
        report({"cell": cell.id, "step": os.getpid()})
        time.sleep(120)
    finally:
        temporary.unlink()
    raise AssertionError("this process was not ended")


def talkative(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    while True:
        report({"cell": cell.id, "step": os.getpid()})
        time.sleep(0.01)


def misfortunes(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    """By seed: raise, diverge, sleep, or allocate without end; succeed for all others."""
    if cell.seed == 1:
        raise RuntimeError("no such thing")
    if cell.seed == 2:
        print("the loss is nan")
        return Store(store_root).save(Record(cell=cell, outcome="diverged", reason="loss nan at step 3"))
    if cell.seed == 3:
        print("now to sleep")
        time.sleep(120)
    if cell.seed == 4:
        hoard()
    return ok(cell, store_root, options, report=report, **more)


def hoard() -> None:
    """Allocate more than the limit, but not more than the machine survives if the limit does not work."""
    hoarded = [b"x" * 2**24 for _ in range(200)]
    raise AssertionError(f"{len(hoarded)} pieces, and this process was not ended")


def delegates(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    """Start a program that takes the memory."""
    code = "import time; kept = b'x' * 2**28; time.sleep(120)"
    program = subprocess.Popen([sys.executable, "-c", code])
    report({"cell": cell.id, "step": program.pid})
    program.wait()
    raise AssertionError("this process was not ended")


def prints(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    """Print in every possible way. Succeed for seed 0; die afterwards for the others."""
    print("\x1b[1mfrom\x1b[0m Python")
    subprocess.run(["echo", "from a program"], check=True)
    print("1 %\r50 %\r100 %\n", file=sys.stderr)
    print("an unfinished line", end="", flush=True)
    if cell.seed:
        os.kill(os.getpid(), signal.SIGKILL)
    return ok(cell, store_root, options, report=report, **more)


def crashes(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("unreachable")


def once(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    """Fail if the same cell has been run before."""
    (store_root / f"{cell.seed}.ran").touch(exist_ok=False)
    time.sleep(0.1)
    return ok(cell, store_root, options, report=report, **more)


def unwritable(cell: Cell, store_root: Path, options: RunOptions, *, report: Report, **more: Any) -> Record:
    raise Unwritable("cannot write there: No space left on device")
