"""Run one cell in its own process."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from petlbench.core.cell import Cell
from petlbench.core.errors import Unwritable, UserError
from petlbench.pipeline.launch.claims import Claim
from petlbench.pipeline.options import RunOptions


@dataclass(frozen=True)
class Job:
    """One cell and all that its process needs: results folder, log, the function that runs it, and options."""

    cell: Cell
    root: Path
    log: Path
    target: str
    options: RunOptions
    fingerprints: Mapping[str, str]
    environ: Mapping[str, str]


def live(writer: Connection, claim: Claim, job: Job) -> None:
    """Run the job in this process, from start to end. Holding `claim` keeps other runs from the cell until then."""
    os.setpgid(0, 0)  # one signal then ends this process and all that it starts
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinding removes temporary files
    threads = job.options.threads or 1
    os.environ.clear()  # the server's environment may be outdated; use the caller's
    os.environ.update(job.environ, OMP_NUM_THREADS=str(threads))
    if torch := sys.modules.get("torch"):  # once imported, torch no longer reads the variable
        torch.set_num_threads(threads)

    def send(kind: str, content: Any) -> None:
        try:
            writer.send((kind, content))
        except OSError:
            os._exit(1)  # the launcher is gone, so nothing needs this cell

    try:
        _print_to(job.log)
        send("begun", None)
        run_cell = pkgutil.resolve_name(job.target)
        fingerprints = job.fingerprints or None
        record = run_cell(
            job.cell, job.root, job.options, fingerprints=fingerprints, report=lambda event: send("event", event)
        )
        send("record", record)
    except Unwritable as error:
        send("unwritable", str(error))
    except UserError as error:
        send("error", str(error))
    except Exception as error:
        traceback.print_exc()
        send("error", f"{type(error).__name__}: {error}")


def _end_with_the_launcher() -> None:
    """End this process group once the launcher has ended, in a thread because the main thread may be busy for long."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.killpg(os.getpid(), signal.SIGKILL)


def _print_to(log: Path) -> None:
    """Append to `log` all that this process and its children print, and the stack of a crash."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    # Line by line, so that a killed process loses no output.
    sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, "utf-8", "replace", closefd=False) for n in (1, 2))
    faulthandler.enable()
