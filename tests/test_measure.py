"""Measurements against cases small enough to work out by hand."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from petlbench.measure import environment, memory
from petlbench.measure.clock import PHASES, PhaseClock
from petlbench.measure.environment import describe, source_tree
from petlbench.measure.flops import step_flops
from petlbench.measure.latency import latency
from petlbench.measure.memory import SavedTensors, account, cuda_peaks, peak_rss_bytes
from petlbench.measure.parameters import count

FLOAT = 4  # bytes


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def pass_(self, seconds: float) -> None:
        self.seconds += seconds


# Parameters


def backbone() -> nn.ModuleDict:
    """A frozen base of 6 scalars, a method's 8, a host's 3, and the host's again under a second name."""
    base = nn.Linear(2, 3, bias=False).requires_grad_(False)
    host = nn.Linear(3, 1, bias=False)
    return nn.ModuleDict({"base": base, "adapter": nn.Linear(3, 2), "host": host, "alias": host})


def test_trainable_scalars_are_split_by_owner_and_shared_ones_count_once() -> None:
    found = count(backbone(), nn.Linear(2, 2), {"alias.weight"})
    assert (found.method, found.head, found.host, found.trainable, found.total) == (8, 6, 3, 17, 23)
    assert found.percent == pytest.approx(100 * 17 / 23)
    assert found.stored_bytes is None


def test_a_frozen_host_part_counts_only_in_the_total() -> None:
    model = backbone()
    model["host"].requires_grad_(False)
    found = count(model, None, {"host.weight"})
    assert (found.method, found.host, found.head, found.total) == (8, 0, 0, 17)


def test_a_parameter_that_head_and_backbone_share_is_the_heads_and_counts_once() -> None:
    model, head = backbone(), nn.Linear(3, 2)
    head.weight = model["adapter"].weight
    found = count(model, head, set())
    assert (found.method, found.head, found.total) == (2 + 3, 6 + 2, 6 + 8 + 3 + 2)


def test_a_host_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"gone\.weight"):
        count(backbone(), None, {"gone.weight", "host.weight"})


# Memory


def test_a_chain_saves_its_input_and_its_activation_once_and_no_parameters() -> None:
    chain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(4, 8)
    with SavedTensors(chain) as saved:
        chain(x).sum().backward()
    # x for the first weight's gradient; relu's output for relu's own gradient and for the second weight's.
    assert saved.saved_bytes == (4 * 8 + 4 * 16) * FLOAT


def test_parameters_count_when_they_are_not_excluded_even_through_a_transposed_view() -> None:
    linear, x = nn.Linear(8, 16, bias=False), torch.randn(4, 8, requires_grad=True)
    with SavedTensors() as saved:
        linear(x)
    assert saved.saved_bytes == (4 * 8 + 8 * 16) * FLOAT
    with SavedTensors(linear) as saved:
        linear(x)
    assert saved.saved_bytes == 4 * 8 * FLOAT


def test_buffers_are_excluded() -> None:
    model = nn.Module()
    model.register_buffer("scale", torch.ones(50))
    x = torch.randn(50, requires_grad=True)
    with SavedTensors(model) as saved:
        x * model.scale
    assert saved.saved_bytes == 0


def test_a_tensor_saved_twice_counts_once() -> None:
    x = torch.randn(10, requires_grad=True)
    with SavedTensors() as saved:
        x * x
    assert saved.saved_bytes == 10 * FLOAT


def test_views_count_their_whole_storage_once() -> None:
    base, weight = torch.randn(100), nn.Parameter(torch.randn(10))
    holder = nn.ParameterList([weight])
    with SavedTensors(holder) as saved:
        weight * base[:10] + weight * base[50:60]
    assert saved.saved_bytes == 100 * FLOAT


def test_a_freed_address_that_is_used_again_counts_again() -> None:
    with SavedTensors() as saved:
        for _ in range(10):
            torch.randn(200_000, requires_grad=True).square()  # freed at once, but for the measurement
    assert saved.saved_bytes == 10 * 200_000 * FLOAT


def test_nothing_is_counted_outside_the_block_or_without_gradients() -> None:
    x = torch.randn(10, requires_grad=True)
    x * x
    with SavedTensors() as saved, torch.no_grad():
        x * x
    x * x
    assert saved.saved_bytes == 0


def test_saving_is_measured_on_the_meta_device_too() -> None:
    with torch.device("meta"):
        chain, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), torch.empty(4, 8)
    with SavedTensors(chain) as saved:
        chain(x).sum().backward()
    assert saved.saved_bytes == (4 * 8 + 4 * 16) * FLOAT
    assert account([chain], None, 0, "meta").weights_bytes == (8 * 16 + 16 + 16 * 2 + 2) * FLOAT


def test_adamw_keeps_two_moments_and_a_step_for_each_parameter() -> None:
    linear = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    scalars = 8 * 4 + 4
    found = account([linear], optimizer, 1000, "cpu, math")
    assert found.weights_bytes == found.gradients_bytes == scalars * FLOAT
    assert found.optimizer_bytes == 2 * scalars * FLOAT + 2 * FLOAT
    assert found.accounted_bytes == 4 * scalars * FLOAT + 2 * FLOAT + 1000
    assert (found.saved_bytes, found.saved_backend) == (1000, "cpu, math")


def test_frozen_parameters_weigh_but_have_neither_gradients_nor_state() -> None:
    linear = nn.Linear(8, 4)
    linear.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([linear.weight])
    linear(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    found = account([linear], optimizer, 0, "cpu")
    assert (found.weights_bytes, found.gradients_bytes) == (36 * FLOAT, 32 * FLOAT)
    assert found.optimizer_bytes == (2 * 32 + 1) * FLOAT


def test_buffers_weigh_and_shared_weights_weigh_once() -> None:
    norm = nn.BatchNorm1d(4)  # weight, bias, mean, variance of 4, and a count of 8 bytes
    assert account([norm], None, 0, "cpu").weights_bytes == 4 * 4 * FLOAT + 8
    one, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    other.weight = one.weight
    assert account([one, other, one], None, 0, "cpu").weights_bytes == 9 * FLOAT


@pytest.mark.parametrize(("system", "expected"), [("linux", 5 * 1024), ("darwin", 5)])
def test_peak_resident_memory_is_in_bytes_on_every_system(
    system: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"ru_maxrss": 5})
    monkeypatch.setattr(memory.resource, "getrusage", {resource.RUSAGE_SELF: usage}.get)
    monkeypatch.setattr(sys, "platform", system)
    assert peak_rss_bytes() == expected


def test_there_are_no_cuda_peaks_off_cuda() -> None:
    assert cuda_peaks("cpu") == (None, None)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peaks_remember_what_was_freed_and_forget_on_reset() -> None:
    memory.reset_cuda_peaks("cuda")
    before, _ = cuda_peaks("cuda")
    torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    allocated, reserved = cuda_peaks("cuda")
    assert allocated == before + (1 << 20)
    assert reserved >= allocated
    memory.reset_cuda_peaks("cuda")
    assert cuda_peaks("cuda")[0] == before


# Time


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
    timing = clock.timing(jobs=2, threads=3, latency_seconds=0.5)
    assert timing.phases == {"data": 36, "forward": 10, "validation": 16, "other": 65}
    assert timing.total_seconds == 127
    assert timing.train_seconds == 46, "evaluation is not training"
    assert (timing.jobs, timing.threads, timing.latency_seconds, timing.step_seconds) == (2, 3, 0.5, None)


def test_phases_sum_exactly_to_the_total_of_a_real_clock() -> None:
    clock = PhaseClock()
    for name in PHASES * 20:
        with clock.phase(name):
            sum(range(100))
    timing = clock.timing()
    assert sum(timing.phases.values()) == timing.total_seconds > 0


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


def test_the_step_median_leaves_out_warm_up_and_failed_steps() -> None:
    now = Clock()
    clock = PhaseClock(now=now)
    for seconds in (50, 60, 70):
        with clock.step():
            now.pass_(seconds)
    assert clock.step_median() is None, "only warm-up so far"
    for seconds in (2, 9, 4):
        with clock.step():
            now.pass_(seconds)
    with pytest.raises(MemoryError), clock.step():
        now.pass_(1)
        raise MemoryError
    assert clock.step_median() == clock.timing().step_seconds == 4
    assert clock.step_median(skip=4) == 6.5


def test_cuda_work_is_waited_for_before_every_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: now.pass_(10))  # as if 10 s were still queued
    clock = PhaseClock("cuda:0", now=now)
    with clock.phase("forward"):
        now.pass_(1)
    assert clock.timing().phases == {"forward": 11, "other": 20}
    with clock.step():
        now.pass_(1)
    assert clock.step_median(skip=0) == 11
    assert latency(lambda: now.pass_(1), now=now, device="cuda:0") == 11


def test_latency_is_the_median_after_warm_up() -> None:
    now, durations = Clock(), iter([90, 80, 1, 7, 3])
    assert latency(lambda: now.pass_(next(durations)), repeats=3, warmup=2, now=now) == 3
    assert next(durations, None) is None


# Operations


@pytest.mark.parametrize(("frozen", "input_trains", "products"), [(False, False, 2), (False, True, 3), (True, True, 2)])
def test_a_linear_layer_costs_one_product_forward_and_one_per_gradient(
    frozen: bool, input_trains: bool, products: int
) -> None:
    linear = nn.Linear(8, 16).requires_grad_(not frozen)
    x = torch.randn(4, 8, requires_grad=input_trains)
    assert step_flops(lambda: linear(x).sum().backward()) == products * 2 * 4 * 8 * 16


def test_attention_is_counted_forward_and_backward_whatever_the_device_would_fuse() -> None:
    batch, heads, length, width = 2, 3, 16, 8
    q, k, v = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))

    def step() -> None:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    assert step_flops(step) == 6 * 2 * batch * heads * length * length * width


# Environment


def git(root: Path, *command: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *identity, *command], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    try:
        git(tmp_path, "init")
    except FileNotFoundError:
        pytest.skip("needs git")
    (tmp_path / "petlbench").mkdir()
    (tmp_path / "petlbench" / "__init__.py").touch()
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_a_checkout_is_named_by_its_commit_and_clean_until_code_changes(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("not code")
    clean = source_tree(checkout)
    assert len(clean["git_commit"]) == 40
    assert clean["git_dirty"] is False
    (checkout / "methods").mkdir()
    (checkout / "methods" / "new.py").touch()
    assert source_tree(checkout) == {**clean, "git_dirty": True}


def installed_below_a_repository(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (checkout / "site" / "petlbench").mkdir(parents=True)
    (checkout / "site" / "petlbench" / "__init__.py").touch()
    return checkout / "site"


def git_is_absent(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", "")
    return checkout


@pytest.mark.parametrize("case", [installed_below_a_repository, git_is_absent])
def test_without_a_checkout_or_git_there_is_no_commit(
    case: Callable[[Path, pytest.MonkeyPatch], Path], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source_tree(case(checkout, monkeypatch)) == {"git_commit": None, "git_dirty": None}


def test_the_description_is_json_with_versions_and_without_paths_or_host_name() -> None:
    found = describe("cpu", threads=3)
    assert json.loads(json.dumps(found)) == found
    assert (found["torch"], found["python"], found["threads"]) == (torch.__version__, platform.python_version(), 3)
    assert found["device_name"] == found["cpu"]
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["cuda_driver"] is None
    assert platform.node() not in found.values()
    assert not any(str(value).startswith(("/", "~")) for value in found.values())
    assert str(Path(environment.__file__).parents[2]) not in json.dumps(found)


def test_the_description_says_whether_algorithms_are_deterministic() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for wanted in (True, False):
            torch.use_deterministic_algorithms(wanted)
            assert describe("cpu", threads=1)["deterministic"] is wanted
    finally:
        torch.use_deterministic_algorithms(before)
