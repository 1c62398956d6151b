"""Claim cells by lock files, so that several runs on one results folder never work on the same cell."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from multiprocessing import reduction
from pathlib import Path
from typing import Any, BinaryIO

from petlbench.core.errors import UserError


class Claim:
    """The right to run a cell. It lasts until the last process that holds it has ended.

    A process of the `forkserver` context that gets the claim as an argument holds it too: the lock belongs to the open
    file description, which both processes share.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file

    def release(self) -> None:
        """Release the claim for all processes that hold it, and remove the lock file. A second call does nothing."""
        if self._file.closed:
            return
        # Remove it while locked: a process that opened it before sees, once it has the lock, that the path is gone.
        self.path.unlink(missing_ok=True)
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def __reduce__(self) -> tuple[Callable[..., Claim], tuple[Path, object]]:
        return _received, (self.path, reduction.DupFd(self._file.fileno()))


def _received(path: Path, handle: Any) -> Claim:
    descriptor = handle.detach()
    os.set_inheritable(descriptor, False)  # programs that the cell starts must not keep holding it
    return Claim(path, os.fdopen(descriptor, "ab"))


def claim_cell(path: Path) -> Claim | None:
    """Return the claim at `path`, whose folder exists, or None while another process holds it.

    Raise UserError if the file cannot be written, or if its file system has no locks.
    """
    while True:
        try:
            file = open(path, "ab")  # noqa: SIM115 - it stays open as long as the claim
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; free it or choose another results folder"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return Claim(path, file)
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            file.close()
            raise UserError(
                f"cannot lock {path}: {error.strerror}; choose a results folder on a file system with locks"
            ) from error
        file.close()  # the file was removed between opening and locking: try again with a new one


def idle(folder: Path) -> bool:
    """Return whether no process holds a claim in `folder`. Remove lock files that no process holds."""
    for path in folder.glob("*.lock"):
        claim = claim_cell(path)
        if claim is None:
            return False
        claim.release()
    return True
