"""Measure the time of one call, and the samples that it handles per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from petlbench.measure.clock import synchronize


def latency(
    fn: Callable[[], object],
    repeats: int = 10,
    warmup: int = 3,
    now: Callable[[], float] = time.perf_counter,
    device: torch.device | str = "cpu",
) -> float:
    """Median seconds of `fn()` over `repeats` calls after `warmup` untimed ones; waits for CUDA around each."""
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = now()
        fn()
        synchronize(device)
        seconds.append(now() - start)
    return median(seconds)


def throughput(
    fn: Callable[[], object],
    samples: int,
    repeats: int = 10,
    warmup: int = 3,
    now: Callable[[], float] = time.perf_counter,
    device: torch.device | str = "cpu",
) -> float:
    """Samples per second of `fn()`, which handles `samples` of them a call, at its median latency."""
    return samples / latency(fn, repeats, warmup, now, device)
