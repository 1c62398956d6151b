"""Seconds, against a clock that stands still until told otherwise."""

from __future__ import annotations

import json

import pytest
import torch

from petlbench.core.record import Peak
from petlbench.measure.clock import PHASES, WARMUP, PhaseClock
from petlbench.measure.latency import latency, throughput


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def pass_(self, seconds: float) -> None:
        self.seconds += seconds


def test_phases_are_exclusive_and_the_remainder_is_other() -> None:
    now = Clock()
    clock = PhaseClock(now=now)
    now.pass_(1)
    with clock.phase("forward"):
        now.pass_(2)
        with clock.phase("data"):
            now.pass_(4)
        now.pass_(8)
    with clock.phase("validation"):
        now.pass_(16)
    with clock.phase("data"):
        now.pass_(32)
    now.pass_(64)
    timing = clock.timing(jobs=2, threads=3)
    assert timing.phases == {"data": 36, "forward": 10, "validation": 16, "other": 65}
    assert timing.total_seconds == 127
    assert timing.train_seconds == 46, "evaluation is not training"
    assert (timing.jobs, timing.threads, timing.resumed, timing.step_seconds) == (2, 3, 0, None)


def test_phases_add_up_to_a_total_that_is_read_off_a_real_clock() -> None:
    clock = PhaseClock()
    for name in PHASES * 20:
        with clock.phase(name), clock.step():
            sum(range(100))
    timing = clock.timing()
    assert sum(timing.phases.values()) == pytest.approx(timing.total_seconds, rel=1e-9)
    assert timing.total_seconds > 0


def test_the_total_is_no_sum_of_the_phases() -> None:
    now = Clock()
    clock = PhaseClock(now=now)
    now.pass_(5)
    clock._seconds = {"other": -1.0}  # books that are wrong
    assert clock.timing().total_seconds == 5


def test_a_phase_that_raises_is_charged_and_closed() -> None:
    now = Clock()
    clock = PhaseClock(now=now)
    with pytest.raises(MemoryError), clock.phase("backward"):
        now.pass_(3)
        raise MemoryError
    now.pass_(5)
    assert clock.timing().phases == {"backward": 3, "other": 5}


def test_an_unknown_phase_is_an_error() -> None:
    with pytest.raises(ValueError, match="trian"), PhaseClock().phase("trian"):
        pass


def step(clock: PhaseClock, now: Clock, *, data: float, forward: float, backward: float, rest: float) -> None:
    with clock.step():
        for name, seconds in (("data", data), ("forward", forward), ("backward", backward)):
            with clock.phase(name):
                now.pass_(seconds)
        now.pass_(rest)


def test_medians_of_a_step_and_of_its_parts_leave_out_the_warm_up_of_every_trial() -> None:
    now = Clock()
    clock = PhaseClock(now=now)
    for _ in range(2):
        clock.warm_up()
        for _ in range(WARMUP):
            step(clock, now, data=70, forward=80, backward=90, rest=100)
        for forward in (2, 9, 4):
            step(clock, now, data=1, forward=forward, backward=10 * forward, rest=0.5)
    with clock.phase("forward"):
        now.pass_(1000)  # an evaluation's, outside steps
    timing = clock.timing()
    assert (timing.step_seconds, timing.forward_seconds, timing.backward_seconds) == (1 + 4 + 40 + 0.5, 4, 40)
    assert timing.optimizer_seconds is None, "no step had one"
    assert timing.phases["forward"] == 2 * (3 * 80 + 2 + 9 + 4) + 1000, "warm-up is left out of medians only"


def test_there_is_no_median_of_warm_up_alone_nor_of_steps_that_failed() -> None:
    now = Clock()
    clock = PhaseClock(now=now)
    for _ in range(WARMUP):
        step(clock, now, data=1, forward=1, backward=1, rest=1)
    with pytest.raises(MemoryError), clock.step(), clock.phase("forward"):
        now.pass_(1)
        raise MemoryError
    timing = clock.timing()
    assert (timing.step_seconds, timing.forward_seconds) == (None, None)


# Resumption


def test_a_clock_goes_on_where_a_killed_one_stopped() -> None:
    now = Clock()
    killed = PhaseClock(now=now)
    killed.warm_up()
    for forward in (1, 1, 1, 10, 30):
        step(killed, now, data=0, forward=forward, backward=1, rest=0)
    state = json.loads(json.dumps(killed.state()))
    now.pass_(1000)  # between the kill and the new start

    clock = PhaseClock(now=now)
    with clock.phase("load"):
        now.pass_(7)
    clock.restore(state)
    clock.warm_up()
    for forward in (90, 90, 90, 20):
        step(clock, now, data=0, forward=forward, backward=1, rest=0)
    timing = clock.timing()
    assert (timing.phases["load"], timing.phases["forward"]) == (7, 43 + 290)
    assert timing.total_seconds == sum(timing.phases.values()) == 43 + 5 + 7 + 290 + 4
    assert (timing.forward_seconds, timing.resumed) == (20, 1), "the median of 10, 30 and 20"
    again = PhaseClock(now=now)
    again.restore(clock.state())
    assert again.timing().resumed == 2


# CUDA, whose functions are replaced by ones with known answers


class Gpu:
    """Work waits in a queue until someone synchronises; memory has a peak since the last reset; reading it costs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: Clock, reading_seconds: float = 0) -> None:
        self.now, self.reading_seconds = now, reading_seconds
        self.queued = 0.0
        self.allocated = self.peak = 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.synchronize())
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.read())
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 10 * self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.reset())

    def work(self, seconds: float) -> None:
        """Queue so much; the call itself takes one second."""
        self.queued += seconds
        self.now.pass_(1)

    def synchronize(self) -> None:
        self.now.pass_(self.queued)
        self.queued = 0.0

    def read(self) -> int:
        self.now.pass_(self.reading_seconds)
        return self.peak

    def reset(self) -> None:
        self.peak = self.allocated

    def use(self, change: int) -> None:
        self.allocated += change
        self.peak = max(self.peak, self.allocated)


def peak(allocated: int) -> Peak:
    return Peak(allocated_bytes=allocated, reserved_bytes=10 * allocated)


def test_peaks_of_memory_belong_to_the_phase_in_which_they_were_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, Clock())
    gpu.use(500)
    gpu.use(-500)  # before the clock started
    clock = PhaseClock("cuda:0")
    with clock.phase("build"):
        gpu.use(100)
    for activations in (40, 60, 20):
        with clock.phase("forward"):
            gpu.use(activations)
            with clock.phase("measure"):
                gpu.use(7)
                gpu.use(-7)
        with clock.phase("backward"):
            gpu.use(5)
            gpu.use(-5 - activations)
    assert clock.peaks() == {
        "build": peak(100),
        "forward": peak(160),
        "backward": peak(165),
        "measure": peak(167),
        "other": peak(160),
    }
    resumed = PhaseClock("cuda:0")
    with resumed.phase("backward"):
        gpu.use(80)
    resumed.restore(clock.state())
    assert resumed.peaks()["backward"] == peak(180) and resumed.peaks()["forward"] == peak(160)


def test_there_are_no_peaks_off_cuda() -> None:
    clock = PhaseClock("cpu")
    with clock.phase("forward"):
        pass
    assert clock.peaks() == {}


def test_queued_work_is_charged_to_the_phase_and_the_step_that_queued_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock()
    gpu = Gpu(monkeypatch, now)
    clock = PhaseClock("cuda:0", now=now)
    with clock.phase("forward"):
        gpu.work(10)
    for queued in (7, 7, 7, 10):
        with clock.step():
            gpu.work(queued)
        gpu.queued = 100  # after the step
    timing = clock.timing()
    assert (timing.phases["forward"], timing.step_seconds) == (11, 11)

    gpu.queued = 50  # before the calls

    assert latency(lambda: gpu.work(10), repeats=1, warmup=0, now=now, device="cuda:0") == 11


def test_reading_peaks_costs_no_phase_and_no_step_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock()
    Gpu(monkeypatch, now, reading_seconds=1000)
    clock = PhaseClock("cuda:0", now=now)
    for _ in range(WARMUP + 1):
        step(clock, now, data=1, forward=2, backward=3, rest=4)
    timing = clock.timing()
    assert (timing.step_seconds, timing.forward_seconds, timing.phases["forward"]) == (10, 2, 2 * (WARMUP + 1))
    assert timing.phases["measure"] % 1000 == 0 < timing.phases["measure"]
    assert sum(timing.phases.values()) == timing.total_seconds


# Inference


def test_latency_is_the_median_after_warm_up() -> None:
    now, durations = Clock(), iter([90, 80, 1, 7, 3])
    assert latency(lambda: now.pass_(next(durations)), repeats=3, warmup=2, now=now) == 3
    assert next(durations, None) is None


def test_throughput_is_the_samples_of_a_call_over_its_median() -> None:
    now, durations = Clock(), iter([90, 1, 40, 4])
    found = throughput(lambda: now.pass_(next(durations)), samples=8, repeats=3, warmup=1, now=now)
    assert found == 8 / 4
    assert next(durations, None) is None
