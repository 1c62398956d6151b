"""Measure what a method costs in training and inference, in a cell and in a profile alike."""

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
    """Return the first batch of training."""
    with closing(Batches(train_rows, setup)) as batches:
        return next(batches)


def canonical_saved_bytes(setup: TrainingSetup, batch: Batch) -> int:
    """Return the bytes that a training step on `batch` saves for backward; every machine gives the same number.

    Of the recipe's options, only gradient checkpointing counts: the operations that autocast lowers and the tensors
    that a compiled layer keeps depend on the device.
    """
    modules = setup.modules().train()
    with torch.compiler.set_stance("force_eager"):
        return saved_bytes(lambda: setup.task.loss(setup.backbone, setup.head, batch), *modules.values())


def training_flops(setup: TrainingSetup, batch: Batch) -> Flops:
    """Return the operations of a training step on `batch`: dropout off, recomputation in backward included.

    Clears all gradients.
    """
    modules = setup.modules().eval()
    with torch.compiler.set_stance("force_eager"):
        flops = step_flops(lambda: setup.task.loss(setup.backbone, setup.head, batch))
    modules.zero_grad(set_to_none=True)
    return flops


def effective_parameters(setup: TrainingSetup, batch: Batch) -> int:
    """Count the trainable scalars that the loss on `batch` can send a gradient to; other tasks' modules get none."""
    setup.modules().train()
    with torch.compiler.set_stance("force_eager"):
        loss = setup.task.loss(setup.backbone, setup.head, batch)
    return parameters.effective(loss, setup.trainable().values())


def inference(setup: TrainingSetup, rows: Dataset, batch_size: int) -> Inference:
    """Measure latency on one row, and throughput on a batch of `batch_size` rows, or fewer if the split has fewer.

    If the method can merge, merge it and measure again; the setup stays merged.
    """
    chosen = [rows[i] for i in range(min(batch_size, len(rows)))]
    speed = {"batch_size": len(chosen), **_speed(setup, chosen)}
    if setup.method is not None and setup.method.mergeable:
        setup.method.merge()
        speed |= {f"merged_{name}": value for name, value in _speed(setup, chosen).items()}
    return Inference(**speed)


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
    """Count the trainable scalars of the setup by owner, and the scalars in its adapter file."""
    backbone = setup.backbone
    counts = count(backbone, setup.head, backbone.host_parameters(), backbone.head_parameters())
    return counts.model_copy(update={"stored": stored_scalars(setup)})


def extra_at_inference(merged: TrainingSetup, untouched_parameters: int) -> int:
    """Count the scalars of a merged setup beyond the untouched backbone and the heads."""
    return inference_extra(merged.backbone, untouched_parameters, merged.backbone.head_parameters())


def stored_scalars(setup: TrainingSetup) -> int:
    """Count the scalars in the adapter file: everything that trains, shared parameters once."""
    return sum(p.numel() for p in setup.trainable().values())
