"""Benchmarks, which are not collected with the tests: `python -m tests.benchmarks.NAME`, or `make microbench`.

With TOY=1 in the environment each runs at a size that takes seconds. Its figures then say nothing, so no limit is held.
"""

import os
from typing import TypeVar

TOY = bool(os.environ.get("TOY"))
T = TypeVar("T")


def sized(full: T, toy: T) -> T:
    """The size that this process runs at."""
    return toy if TOY else full


def holds(limit: float, *ratios: float) -> bool:
    """Whether no ratio is above the limit."""
    return TOY or max(ratios) <= limit
