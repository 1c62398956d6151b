"""Measure memory in bytes: an exact accounting that is equal on every device, and the machine's peaks."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from petlbench.core.record import Memory, Peak
from petlbench.measure.canonical import canonical

Key = tuple[torch.device, int]


def _key(storage: torch.UntypedStorage) -> Key:
    """Return a key that identifies a living storage; on the meta device storages have no address."""
    return storage.device, storage.data_ptr() or storage._cdata


def storages(tensors: Iterable[Tensor]) -> dict[Key, torch.UntypedStorage]:
    """The distinct storages under `tensors`: views and shared tensors come down to one."""
    found = (t.untyped_storage() for t in tensors)
    return {_key(s): s for s in found}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under `tensors`, each counted whole."""
    return sum(s.nbytes() for s in storages(tensors).values())


def _weights(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    return chain.from_iterable(chain(m.parameters(), m.buffers()) for m in modules)


class SavedTensors:
    """Counts what autograd saves for backward inside the `with` block.

    Each storage counts once and whole, whatever views of it are saved: a slice counts as what it is cut from, an
    expanded tensor as what it repeats. Parameters and buffers of `modules` do not count. Everything counted stays
    alive until the block ends, so that no address is freed and taken for one already counted: wrap the forward pass
    alone, and backward releases memory as ever. Of a checkpointed layer its input counts; what it saves while it is
    recomputed, and what a custom function keeps outside `save_for_backward`, is invisible to autograd's hooks. Under
    autocast the lowered copies of weights count: they are kept for backward beside the weights.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self._excluded: dict[Key, torch.UntypedStorage] = {}
        self._kept: dict[Key, torch.UntypedStorage] = {}
        self._hooks: saved_tensors_hooks | None = None
        self.saved_bytes = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = _key(storage)
        if key not in self._excluded and key not in self._kept:
            self._kept[key] = storage
            self.saved_bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedTensors:
        self.saved_bytes = 0
        # Kept alive too: an activation may not take the address of a buffer that the forward pass replaces.
        self._excluded = storages(_weights(self._modules))
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(kind, error, trace)
        self._excluded.clear()
        self._kept.clear()


@contextmanager
def _undisturbed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore what a forward pass changes: random states, and buffers such as running statistics."""
    tensors = list(_weights(modules))
    buffers = [(b, b.clone()) for m in modules for b in m.buffers()]
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def saved_bytes(loss: Callable[[], Tensor], *modules: nn.Module) -> int:
    """Return the bytes that one forward pass `loss()` saves for backward; equal on every machine, see `canonical`.

    Parameters and buffers of `modules` do not count. Random states and buffers are afterwards as they were before.
    """
    with _undisturbed(modules), torch.enable_grad(), canonical(), SavedTensors(*modules) as saved:
        loss()
    return saved.saved_bytes


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an optimizer's state, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, (list, tuple)):
        yield from chain.from_iterable(map(_tensors, value))


def account(
    modules: Iterable[nn.Module],
    optimizer: torch.optim.Optimizer | None,
    saved_bytes: int,
    *,
    native_saved_bytes: int | None = None,
    backend: str = "",
) -> Memory:
    """Weights, gradients, optimizer state and saved tensors, in bytes of distinct storages.

    Call it after `backward` and an optimizer step, before gradients are cleared. Buffers are weights; the optimizer's
    step counters are state. `saved_bytes` is the canonical count; `backend` names what `native_saved_bytes` depends on.
    """
    modules = list(modules)
    gradients = storage_bytes(p.grad for m in modules for p in m.parameters() if p.grad is not None)
    state = storage_bytes(_tensors(dict(optimizer.state))) if optimizer is not None else 0
    found = _accounted(modules, gradients, state, saved_bytes)
    return found.model_copy(update={"native_saved_bytes": native_saved_bytes, "saved_backend": backend})


def planned(modules: Iterable[nn.Module], saved_bytes: int = 0) -> Memory:
    """Return what `account` finds after a step of AdamW, without running or allocating; works on the meta device.

    Every trainable parameter is taken to receive a gradient. One that never does costs nothing when training really
    runs, so there `account` is lower: by its gradient, its two moments and its step counter.
    """
    modules = list(modules)
    trainable = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}
    gradients = sum(p.numel() * p.element_size() for p in trainable.values())
    counter = 8 if torch.get_default_dtype() == torch.float64 else 4  # AdamW counts steps in the default precision
    return _accounted(modules, gradients, 2 * gradients + counter * len(trainable), saved_bytes)


def _accounted(modules: Iterable[nn.Module], gradients: int, state: int, saved_bytes: int) -> Memory:
    weights = storage_bytes(_weights(modules))
    known = Memory(
        weights_bytes=weights, gradients_bytes=gradients, optimizer_bytes=state, saved_bytes=None, accounted_bytes=None
    )
    return with_saved(known, saved_bytes)


def with_saved(memory: Memory, canonical: int | None) -> Memory:
    """The accounting of a step, completed with the canonical bytes saved for backward (None: unknown)."""
    others = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes
    accounted = None if canonical is None else others + canonical
    return memory.model_copy(update={"saved_bytes": canonical, "accounted_bytes": accounted})


def with_peaks(memory: Memory, peaks: Mapping[str, Peak]) -> Memory:
    """Return `memory` with the CUDA peaks by phase and the highest of them, which is None without peaks."""
    highest = {
        f"peak_{name}": max((getattr(peak, name) for peak in peaks.values()), default=None)
        for name in Peak.model_fields
    }
    return memory.model_copy(update={**highest, "peaks": dict(peaks)})


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far; it cannot be reset."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes everywhere but on macOS


def reset_cuda_peaks(device: torch.device | str) -> None:
    """Start a new measurement of peaks; without effect off CUDA."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def cuda_peaks(device: torch.device | str) -> tuple[int, int] | tuple[None, None]:
    """Peak bytes (allocated, reserved) since the last reset; (None, None) off CUDA."""
    if torch.device(device).type != "cuda":
        return None, None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
