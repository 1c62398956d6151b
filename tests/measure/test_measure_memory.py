"""Bytes, against cases small enough to work out by hand."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from petlbench.core.record import Memory, Peak
from petlbench.measure import memory
from petlbench.measure.memory import (
    SavedTensors,
    account,
    cuda_peaks,
    peak_rss_bytes,
    planned,
    saved_bytes,
    with_peaks,
    with_saved,
)
from tests.backbone_factory import small_tiny

FLOAT = 4  # bytes


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


def test_an_activation_at_the_address_of_a_buffer_that_the_forward_pass_replaced_counts() -> None:
    model, count = nn.Module(), 200_000
    model.register_buffer("state", torch.zeros(count))
    x = torch.randn(count, requires_grad=True)
    with SavedTensors(model) as saved:
        for _ in range(5):
            model.state = torch.zeros(0)  # frees the buffer's memory, but for the measurement
            x.detach().clone().requires_grad_().square()
    assert saved.saved_bytes == 5 * count * FLOAT


def test_a_slice_counts_as_what_it_is_cut_from_and_an_expanded_tensor_as_what_it_repeats() -> None:
    x, matrix = torch.randn(6, requires_grad=True), torch.randn(6, 50)
    with SavedTensors() as saved:
        x * matrix[:, 3]
    assert saved.saved_bytes == 6 * 50 * FLOAT
    with SavedTensors() as saved:
        x * torch.randn(1).expand(6)
    assert saved.saved_bytes == FLOAT


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
    assert account([chain], None, 0).weights_bytes == (8 * 16 + 16 + 16 * 2 + 2) * FLOAT
    chain.append(nn.Dropout(0.5))
    assert saved_bytes(lambda: chain(x).sum(), chain) == (4 * 8 + 4 * 16) * FLOAT + 4 * 2


# The canonical figure


def dropping() -> tuple[nn.Sequential, Tensor]:
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2)), torch.randn(4, 8)


def test_the_canonical_figure_counts_one_byte_for_an_element_of_a_dropout_mask() -> None:
    chain, x = dropping()
    assert saved_bytes(lambda: chain(x).sum(), chain) == (4 * 8 + 4 * 16) * FLOAT + 4 * 16
    with torch.no_grad():
        assert saved_bytes(lambda: chain(x).sum(), chain) > 0, "whatever the caller had switched off"


def test_measuring_leaves_random_states_and_buffers_as_they_were() -> None:
    chain, x = dropping()
    model = nn.Sequential(chain, nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(MemoryError):
        saved_bytes(failing(lambda: model(x)), model)
    assert saved_bytes(lambda: model(x).sum(), model) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def failing(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        forward()
        raise MemoryError

    return loss


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_canonical_figure_is_the_same_in_every_run_and_for_every_number_of_threads(dropout: float) -> None:
    backbone = small_tiny(dropout=dropout).train()
    texts = backbone.texts(["red circle", "the small blue square on the left"], 16)

    def loss() -> Tensor:
        return backbone.fuse(backbone.embed_text(texts), task="vqa").states.sum()

    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            found.append(saved_bytes(loss, backbone))
    finally:
        torch.set_num_threads(threads)
    assert len(set(found)) == 1 and found[0] > 0


# Accounts


def test_adamw_keeps_two_moments_and_a_step_for_each_parameter() -> None:
    linear = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    scalars = 8 * 4 + 4
    found = account([linear], optimizer, 1000, native_saved_bytes=1200, backend="cpu, sdpa attention")
    assert found.weights_bytes == found.gradients_bytes == scalars * FLOAT
    assert found.optimizer_bytes == 2 * scalars * FLOAT + 2 * FLOAT
    assert found.accounted_bytes == 4 * scalars * FLOAT + 2 * FLOAT + 1000
    assert (found.saved_bytes, found.native_saved_bytes) == (1000, 1200)
    assert found.saved_backend == "cpu, sdpa attention"


def test_frozen_parameters_weigh_but_have_neither_gradients_nor_state() -> None:
    linear = nn.Linear(8, 4)
    linear.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([linear.weight])
    linear(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    found = account([linear], optimizer, 0)
    assert (found.weights_bytes, found.gradients_bytes) == (36 * FLOAT, 32 * FLOAT)
    assert found.optimizer_bytes == (2 * 32 + 1) * FLOAT


def test_buffers_weigh_and_shared_weights_weigh_once() -> None:
    norm = nn.BatchNorm1d(4)  # weight, bias, mean, variance of 4, and a count of 8 bytes
    assert account([norm], None, 0).weights_bytes == 4 * 4 * FLOAT + 8
    one, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    other.weight = one.weight
    assert account([one, other, one], None, 0).weights_bytes == 9 * FLOAT


# Plans


def stepped(*modules: nn.Module, x: Tensor) -> Memory:
    """The account after one real step of AdamW through `modules` in a chain."""
    trainable = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values())
    nn.Sequential(*modules)(x).sum().backward()
    optimizer.step()
    return account(modules, optimizer, 100)


def test_a_plan_is_the_account_of_a_real_step_frozen_and_shared_parameters_included() -> None:
    one, frozen, norm, other = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
    frozen.requires_grad_(False)
    other.weight = one.weight
    modules = (one, frozen, norm, other)
    plan = planned(modules, 100)
    assert plan.gradients_bytes == (6 * 6 + 6 + 6 + 2 * 6) * FLOAT
    assert plan == stepped(*modules, x=torch.randn(3, 6))


def test_a_plan_counts_steps_in_the_default_precision_as_adamw_does() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        linear = nn.Linear(4, 4)
        assert planned([linear], 100) == stepped(linear, x=torch.randn(3, 4))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_plan_needs_no_memory() -> None:
    real, shapes = small_tiny(), small_tiny().to("meta")
    shapes.token_embedding.requires_grad_(False)
    real.token_embedding.requires_grad_(False)
    assert planned([shapes]) == planned([real])
    assert planned([shapes]).weights_bytes == account([real], None, 0).weights_bytes


def test_a_plan_exceeds_the_account_by_parameters_that_get_no_gradient() -> None:
    used, idle = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = torch.optim.AdamW([*used.parameters(), *idle.parameters()])
    used(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    plan, found = planned([used, idle]), account([used, idle], optimizer, 0)
    assert plan.weights_bytes == found.weights_bytes
    assert plan.accounted_bytes - found.accounted_bytes == (3 * 20 + 2) * FLOAT, "of 20 scalars in two parameters"


def test_an_account_is_completed_with_the_canonical_figure_or_left_open() -> None:
    known = account([nn.Linear(4, 4)], None, 10, native_saved_bytes=7, backend="cpu")
    assert known.accounted_bytes == 20 * FLOAT + 10
    completed = with_saved(known, 30)
    assert (completed.saved_bytes, completed.accounted_bytes) == (30, 20 * FLOAT + 30)
    assert (completed.native_saved_bytes, completed.saved_backend) == (7, "cpu")
    unknown = with_saved(known, None)
    assert unknown.saved_bytes is unknown.accounted_bytes is None


# Peaks


def test_the_highest_peaks_of_all_phases_stand_beside_them() -> None:
    plain = account([nn.Linear(4, 4)], None, 0)
    peaks = {"data": Peak(allocated_bytes=5, reserved_bytes=20), "test": Peak(allocated_bytes=7, reserved_bytes=9)}
    found = with_peaks(plain, peaks)
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes, found.peaks) == (7, 20, peaks)
    assert found.weights_bytes == plain.weights_bytes
    assert with_peaks(plain, {}) == plain and plain.peak_allocated_bytes is None


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
