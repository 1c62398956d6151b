"""Watch a cell's process from outside: check its limits, signal it, and read the last lines of its log."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from petlbench.core.recipe import Outcome
from petlbench.core.units import human_bytes, human_seconds

CGROUPS = Path("/sys/fs/cgroup")
MEMORY_SHARE = 0.9  # beyond this share, the kernel might kill the launcher instead
FAMILY_SECONDS = 1.0  # between two searches for new descendants, each of which reads all of /proc
LOG_LINES = 20
LINE_LENGTH = 500
LOG_BYTES = 2**16  # read at most this many bytes from the end of a log
CONTROLS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.|[\x00-\x08\x0a-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Limits:
    """The limits of one cell: `timeout` in seconds, and `memory_limit` in bytes of resident memory."""

    timeout: float | None
    memory_limit: int


def machine_memory(table: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> int:
    """Return how many bytes this process and its children can use: the machine's, or its control group's limit."""
    limits = [psutil.virtual_memory().total]
    with suppress(OSError):
        for line in table.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            base, file = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
            folder = base / name.lstrip("/")
            # An ancestor's limit counts too; inside a container the folder itself may not exist.
            for place in [folder, *folder.parents]:
                if place.is_relative_to(base):
                    with suppress(OSError, ValueError):  # ValueError: "max", no limit
                        limits.append(int((place / file).read_text()))
    return min(limits)


def fair_share(jobs: int) -> int:
    """Return the default memory limit of a cell, in bytes."""
    return int(MEMORY_SHARE * machine_memory() / jobs)


@dataclass
class Watch:
    """Watches the process `pid` of a cell and its descendants."""

    pid: int
    limits: Limits
    begun: float | None = None  # monotonic seconds; None until the cell itself has begun, after the server's imports
    _family: list[psutil.Process] = field(default_factory=list)
    _listed: float = float("-inf")

    def passed(self) -> tuple[Outcome, str] | None:
        """Return the outcome and the reason once a limit is exceeded; None before that."""
        timeout, memory_limit = self.limits.timeout, self.limits.memory_limit
        if timeout is not None and self.begun is not None and time.monotonic() - self.begun > timeout:
            return "timeout", f"took longer than the timeout of {human_seconds(timeout)}"
        used = self.resident_bytes()
        if used > memory_limit:
            limit = human_bytes(memory_limit)
            return "oom", f"resident memory {human_bytes(used)} passed the memory_limit of {limit}"
        return None

    def resident_bytes(self) -> int:
        """Return the resident memory of all processes together; a page that two share counts twice."""
        now = time.monotonic()
        if now >= self._listed + FAMILY_SECONDS:
            self._listed = now
            self._family = []
            with suppress(psutil.Error):
                head = psutil.Process(self.pid)
                self._family = [head, *head.children(recursive=True)]
        used = 0
        for process in self._family:
            with suppress(psutil.Error):
                used += process.memory_info().rss
        return used


def signal_group(pid: int, number: int) -> None:
    """Send a signal to the process group that `pid` leads, or to the process alone if the group does not exist yet."""
    for send in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            send(pid, number)
            return


def last_lines(log: Path, start: int = 0) -> tuple[str, ...]:
    """Return the last lines with text in `log`, from byte `start` on, as a terminal would show them."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    # A carriage return overwrites the text before it, so a progress bar is one line, not hundreds.
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    clean = (CONTROLS.sub("", line).expandtabs().rstrip()[:LINE_LENGTH] for line in lines)
    return tuple(line for line in clean if line)[-LOG_LINES:]
