"""Benchmarks, which the tests do not collect: `python -m tests.benchmarks.NAME`, or `make microbench`.

With TOY=1 in the environment each runs at a size that takes seconds; its figures then mean nothing, so no limit holds.
"""

import os
from typing import TypeVar

TOY = bool(os.environ.get("TOY"))
T = TypeVar("T")


def sized(full: T, toy: T) -> T:
    """Return the size at which this process runs."""
    return toy if TOY else full


def holds(limit: float, *ratios: float) -> bool:
    """Return whether no ratio is above the limit."""
    return TOY or max(ratios) <= limit
