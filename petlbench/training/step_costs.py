"""What a method in its setting costs: measured the same way in a cell and in a profile."""

from __future__ import annotations

from contextlib import closing

import torch
from datasets import Dataset

from petlbench.api.task import Batch, Row
from petlbench.core.record import Flops, Inference, Parameters
from petlbench.measure import parameters
from petlbench.measure.flops import step_flops
from petlbench.measure.latency import latency, throughput
from petlbench.measure.memory import saved_bytes
from petlbench.measure.parameters import count, inference_extra
from petlbench.training.batches import Batches
from petlbench.training.precision import computing
from petlbench.training.setup import TrainingSetup


def first_batch(train_rows: Dataset, setup: TrainingSetup) -> Batch:
    """The batch that training starts with."""
    with closing(Batches(train_rows, setup)) as batches:
        return next(batches)


def canonical_saved_bytes(setup: TrainingSetup, batch: Batch) -> int:
    """Bytes that a training step on `batch` saves for backward: the same on every machine.

    Of the recipe's options it sees gradient checkpointing, and no other: which operations autocast lowers, and what a
    compiled layer keeps, depends on the device.
    """
    modules = setup.modules().train()
    with torch.compiler.set_stance("force_eager"):
        return saved_bytes(lambda: setup.task.loss(setup.backbone, setup.head, batch), *modules.values())


def training_flops(setup: TrainingSetup, batch: Batch) -> Flops:
    """Operations of a training step on `batch`, dropout off, recomputation in backward included.

    Leaves the setting without gradients.
    """
    modules = setup.modules().eval()
    with torch.compiler.set_stance("force_eager"):
        found = step_flops(lambda: setup.task.loss(setup.backbone, setup.head, batch))
    modules.zero_grad(set_to_none=True)
    return found


def effective_parameters(setup: TrainingSetup, batch: Batch) -> int:
    """Trainable scalars that the loss on `batch` can send a gradient to: not those of other tasks' modules, say."""
    setup.modules().train()
    with torch.compiler.set_stance("force_eager"):
        loss = setup.task.loss(setup.backbone, setup.head, batch)
    return parameters.effective(loss, setup.trainable().values())


def inference(setup: TrainingSetup, rows: Dataset, batch_size: int) -> Inference:
    """Latency on one row, and throughput on a batch of `batch_size` rows or as many as there are.

    Measured again after merging where the method can merge: the setting is left merged then.
    """
    chosen = [rows[i] for i in range(min(batch_size, len(rows)))]
    found = {"batch_size": len(chosen), **_speed(setup, chosen)}
    if setup.method is not None and setup.method.mergeable:
        setup.method.merge()
        found |= {f"merged_{name}": value for name, value in _speed(setup, chosen).items()}
    return Inference(**found)


def _speed(setup: TrainingSetup, rows: list[Row]) -> dict[str, float]:
    setup.modules().eval()

    @torch.no_grad()
    def predict(part: list[Row]) -> None:
        batch = setup.task.collate(part, setup.backbone, None).to(setup.device)
        with computing(setup.recipe, setup.device):
            setup.task.predict(setup.backbone, setup.head, batch, beams=setup.recipe.beams)

    once = latency(lambda: predict(rows[:1]), repeats=9, warmup=2, device=setup.device)
    many = throughput(lambda: predict(rows), len(rows), repeats=3, warmup=1, device=setup.device)
    return {"latency_seconds": once, "throughput": many}


def counted(setup: TrainingSetup) -> Parameters:
    """The trainable scalars of the setting by owner, and how many an adapter file of it holds."""
    backbone = setup.backbone
    found = count(backbone, setup.head, backbone.host_parameters(), backbone.head_parameters())
    return found.model_copy(update={"stored": stored_scalars(setup)})


def extra_at_inference(merged: TrainingSetup, untouched_parameters: int) -> int:
    """Scalars of a merged setting beyond the untouched backbone and the heads."""
    return inference_extra(merged.backbone, untouched_parameters, merged.backbone.head_parameters())


def stored_scalars(setup: TrainingSetup) -> int:
    """Scalars in the adapter file: everything that trains, shared ones once."""
    return sum(p.numel() for p in setup.trainable().values())
