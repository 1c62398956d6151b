"""Observe a method on one task: in two short trainings, and after each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method
from petlbench.api.snapshot import Snapshot
from petlbench.backbones.supplied import with_parts_of
from petlbench.conformance import watch
from petlbench.conformance.bench import Bench, Outputs, Reference
from petlbench.conformance.module_snapshot import ModuleSnapshot, differing, digests, tensors, values
from petlbench.core.messages import one_line
from petlbench.measure.memory import storages
from petlbench.pipeline.assembly import build_method
from petlbench.training.loop import Diverged, fit
from petlbench.training.setup import TrainingSetup
from petlbench.training.state import TrainingResult


@dataclass
class Observations:
    """Observations; those that could not be made are None. Names are those in the backbone or the adapter file."""

    claims: Method  # as configured at first; once applied, the applied method
    error: str = ""  # the exception that ended the observation
    diverged: str = ""
    # before training
    start: Outputs | None = None
    untouched: Outputs | None = None  # the same head and supplied parts on the untouched backbone
    moved_modes: list[str] = field(default_factory=list)  # modules whose mode `adapt` changed
    # after training
    frozen_changed: list[str] | None = None
    trainable: list[str] = field(default_factory=list)
    alive: set[str] | None = None
    idle: set[str] = field(default_factory=set)  # trainable names that the task cannot reach
    trained: Outputs | None = None
    repeated: Outputs | None = None
    regrouped: Any = None  # predictions of the same rows in other batches
    touched: list[str] = field(default_factory=list)  # tensors that evaluation changed
    awake: list[str] = field(default_factory=list)  # modules in training mode after evaluation
    values: dict[str, str] = field(default_factory=dict)
    sharing: list[str] = field(default_factory=list)  # trainable names that share memory with frozen tensors
    unsaved: list[str] = field(default_factory=list)  # names that the adapter file lacks or has in excess
    losses: Any = None
    # after `restore`
    left: list[str] | None = None
    restored: Outputs | None = None
    original: Outputs | None = None
    # the second training, from the same seed
    again: Outputs | None = None
    again_losses: Any = None
    reached: list[str] | None = None  # frozen modules that autograd enters
    # `merge`
    unmerged: Outputs | None = None
    merged: Outputs | None = None
    tolerance: float = 0.0
    merge_error: str = ""
    # a new process
    reloaded: dict[str, Any] | None = None


def observe(bench: Bench, cls: type[Method], reference: Reference, file: Path) -> Observations:
    """Make all observations but those of the new process, for which the adapter is saved at `file`."""
    seen = Observations(build_method(bench.cell, cls), original=reference.outputs)
    try:
        _first(seen, bench, reference, file, build_method(bench.cell, cls))
        if seen.trained is not None:
            _second(seen, bench, build_method(bench.cell, cls))
    except Diverged as error:
        seen.diverged = str(error)
    except Exception as error:  # a method's code may raise anything
        seen.error = one_line(error)
    return seen


def train_steps(bench: Bench, setup: TrainingSetup) -> TrainingResult:
    """Train for ten steps from the same random state, whatever was observed before."""
    torch.manual_seed(bench.cell.seed + 1)
    return fit(setup, bench.data.train, bench.data.validation, bench.cell.recipe.lr)


def _first(seen: Observations, bench: Bench, reference: Reference, file: Path, method: Method) -> None:
    backbone = bench.backbone()
    snapshot, modules = ModuleSnapshot(backbone), dict(backbone.named_modules())
    parameters, own = dict(backbone.named_parameters()), tensors(backbone)
    modes = {name: module.training for name, module in modules.items()}
    setup, handle = bench.setup(backbone, method)
    seen.claims = method
    seen.moved_modes = [name for name, module in modules.items() if module.training != modes[name]]
    trained = setup.trainable()
    idle = reference.idle(modules, parameters, setup.backbone)
    seen.trainable, seen.idle = list(trained), {name for name, p in trained.items() if id(p) in idle}
    seen.start = bench.outputs(setup.backbone, setup.head)
    seen.untouched = bench.outputs(with_parts_of(reference.backbone, setup.backbone), setup.head)
    if not seen.start.finite:
        return
    frozen = _frozen(setup, own)
    before = digests(frozen)
    with watch.watch_gradients(trained) as seen.alive:
        fitted = train_steps(bench, setup)
    seen.losses = fitted.losses
    seen.frozen_changed = differing(before, digests(frozen))
    _observe_evaluation(seen, bench, setup)
    seen.values = values(setup.modules(), method)
    _save(seen, setup, fitted, frozen, file)
    _remove(seen, bench, reference, backbone, handle, snapshot)


def _reached(bench: Bench, setup: TrainingSetup, modules: dict[str, nn.Module]) -> list[str]:
    setup.modules().train()
    batch = bench.batch(setup.backbone, bench.rows, training=True)
    with watch.graph(modules) as names:
        setup.task.loss(setup.backbone, setup.head, batch)
    return names


def _frozen(setup: TrainingSetup, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors that must keep their values: the backbone's frozen ones and the method's frozen parameters.

    The method's buffers may change, as long as a new process gives the same predictions.
    """
    own_ids = {id(t) for t in own.values()}
    parameters = setup.modules().named_parameters()
    inserted = {name: p for name, p in parameters if not p.requires_grad and id(p) not in own_ids}
    return {name: t for name, t in own.items() if not t.requires_grad} | inserted


def _observe_evaluation(seen: Observations, bench: Bench, setup: TrainingSetup) -> None:
    modules, backbone, head = setup.modules(), setup.backbone, setup.head
    before = digests(tensors(modules))
    seen.trained = bench.outputs(backbone, head)
    seen.touched = differing(before, digests(tensors(modules)))
    seen.awake = [name for name, module in modules.named_modules() if module.training and name]
    modules.train()
    seen.repeated = bench.outputs(backbone, head)
    halves = bench.rows[:1], bench.rows[1:]
    seen.regrouped = [p for rows in halves if rows for p in bench.predictions(backbone, head, rows)]


def _save(
    seen: Observations, setup: TrainingSetup, fitted: TrainingResult, frozen: dict[str, Tensor], file: Path
) -> None:
    """Write the adapter file as a run does, and compare it with the trainable parameters."""
    trained = setup.trainable()
    occupied = storages(frozen.values()).keys()
    seen.sharing = [name for name, p in trained.items() if storages([p]).keys() & occupied]
    sizes = {name: str(tuple(t.shape)) for name, t in fitted.state.items()}
    seen.unsaved = differing(sizes, {name: str(tuple(p.shape)) for name, p in trained.items()})
    save_file({name: value.cpu().contiguous() for name, value in fitted.state.items()}, file)


def _remove(
    seen: Observations,
    bench: Bench,
    reference: Reference,
    backbone: Backbone,
    handle: Snapshot,
    snapshot: ModuleSnapshot,
) -> None:
    handle.restore()
    own, untouched = digests(tensors(backbone)), digests(tensors(reference.backbone))
    values = [f"values of {name}" for name in differing(untouched, own)]
    seen.left = [name for name in snapshot.changes() if name not in reference.habits] + values
    seen.restored = bench.outputs(with_parts_of(backbone, reference.extended), reference.head)


def _second(seen: Observations, bench: Bench, method: Method) -> None:
    backbone = bench.backbone()
    modules = dict(backbone.named_modules())
    setup, _ = bench.setup(backbone, method)
    seen.again_losses = train_steps(bench, setup).losses
    seen.again = bench.outputs(setup.backbone, setup.head)
    seen.reached = _reached(bench, setup, modules) if seen.claims.no_backbone_gradient else None
    if not seen.claims.mergeable:
        return
    try:
        setup.modules().double()
        dtype, seen.tolerance = torch.float64, 1e-9
        seen.unmerged = bench.outputs(setup.backbone, setup.head, dtype)
    except RuntimeError:  # a part that cannot compute in double precision
        setup.modules().float()
        dtype, seen.tolerance = torch.float32, 1e-4
        seen.unmerged = bench.outputs(setup.backbone, setup.head, dtype)
    try:
        method.merge()
        seen.merged = bench.outputs(setup.backbone, setup.head, dtype)
    except Exception as error:  # a method's code may raise anything
        seen.merge_error = one_line(error)
