"""Side-tuning saves memory: a training step keeps fewer bytes than full fine-tuning's on the same batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from petlbench.api.backbone import Backbone
from petlbench.api.registries import TASKS
from petlbench.core.cell import Cell
from petlbench.core.recipe import Recipe
from petlbench.pipeline.assembly import build_backbone, build_setup
from petlbench.pipeline.data import load_source, load_split
from petlbench.training.context import RunContext
from petlbench.training.step_costs import canonical_saved_bytes, first_batch

LIMIT = 0.45
SCENES = dict.fromkeys(("train_scenes", "validation_scenes", "test_scenes"), 32)
# BART-base as published, with a small CNN, which keeps nothing, and random weights: they do not change the bytes.
BASE = {"weights": "none", "cnn": "tiny", "tokenizer": "tiny/tokenizer.json"}


def kept(method: str, task: str, name: str, config: dict[str, Any], batch: int) -> int:
    """Return the canonical bytes saved for backward."""
    cell = Cell(
        method=method,
        task=task,
        dataset="digits",
        dataset_config=SCENES,
        backbone=name,
        backbone_config=config,
        recipe=Recipe(batch_size=batch, train_limit=batch),
    )
    device, asked = torch.device("cpu"), TASKS.get(task)()
    backbone: Backbone = build_backbone(cell, device)
    setup, _ = build_setup(cell, backbone, asked, RunContext.on(device))
    rows = load_split(cell, load_source(cell, None), asked, "train")
    return canonical_saved_bytes(setup, first_batch(rows, setup))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "side_memory"))


@pytest.mark.parametrize("task", ["rec", "vqa", "captioning", "retrieval"])
def test_m2ist_keeps_less_than_half_on_tiny(task: str) -> None:
    side, full = (kept(method, task, "tiny", {}, 16) for method in ("m2ist", "full"))
    assert 0 < side <= LIMIT * full


@pytest.mark.slow
@pytest.mark.parametrize("task", ["rec", "vqa", "captioning", "retrieval"])
def test_m2ist_keeps_less_than_half_at_the_size_of_bart_base(task: str) -> None:
    side, full = (kept(method, task, "vl_bart", BASE, 2) for method in ("m2ist", "full"))
    assert 0 < side <= LIMIT * full
