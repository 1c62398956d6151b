"""Referring expressions in training: augmented rows, in any number of worker processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from petlbench.tasks.rec import corners
from PIL import Image

from petlbench.api.backbone import Backbone
from petlbench.api.registries import METHODS, TASKS
from petlbench.api.tokens import Placement
from petlbench.backbones.supplied import SuppliedBackbone
from petlbench.core.cell import Cell
from petlbench.core.recipe import Recipe
from petlbench.core.record import Record
from petlbench.pipeline.cell import run_cell
from petlbench.pipeline.options import RunOptions
from tests.backbone_factory import small_tiny

pytest.importorskip("timm")
from petlbench.backbones.transvg import TransVG

SMALL = {"train_scenes": 16, "validation_scenes": 8, "test_scenes": 8}
TRAINED = {"tiny": "lora", "transvg:tiny": "m2ist"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETLBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def trained(out: Path, backbone: str, augment: str, workers: int = 0) -> Record:
    recipe = Recipe(steps=4, batch_size=4, eval_batch_size=8, augment=augment)
    cell = Cell(
        method=TRAINED[backbone],
        task="rec",
        dataset="digits",
        dataset_config=SMALL,
        backbone=backbone,
        recipe=recipe,
    )
    return run_cell(cell, out / f"{augment}{workers}", RunOptions(device="cpu", threads=1, workers=workers))


@pytest.mark.parametrize("backbone", TRAINED)
def test_augmented_training_is_the_same_however_many_workers_make_its_batches(backbone: str, tmp_path: Path) -> None:
    alone, helped = (trained(tmp_path, backbone, "transvg", workers) for workers in (0, 2))
    assert (alone.outcome, alone.reason, helped.outcome) == ("ok", "", "ok")
    assert alone.metrics.keys() == {"acc_50", "mean_iou"}
    losses = alone.trials[0].losses
    assert len(losses) == 4 and all(math.isfinite(loss) for _, loss in losses)
    assert losses == helped.trials[0].losses
    assert (alone.metrics, alone.validation) == (helped.metrics, helped.validation)


@pytest.mark.parametrize("augment", ["transvg", "transvg_released"])
def test_a_recipe_chooses_the_augmentation(augment: str, tmp_path: Path) -> None:
    plain, augmented = (trained(tmp_path, "transvg:tiny", name) for name in ("none", augment))
    assert (plain.outcome, augmented.outcome) == ("ok", "ok")
    assert plain.trials[0].losses != augmented.trials[0].losses


ADAPTED: dict[str, Callable[[Backbone], Backbone]] = {
    "bare": lambda backbone: backbone,
    "adapted": lambda backbone: METHODS.get("m2ist")().adapt(backbone),
    "wrapped": lambda backbone: SuppliedBackbone(backbone, {}),
}


@pytest.mark.parametrize("adapt", ADAPTED.values(), ids=ADAPTED)
def test_placements_reach_the_canvas(adapt: Callable[[Backbone], Backbone]) -> None:
    backbone = adapt(TransVG(TransVG.configured("transvg:tiny", {})))
    rows = [
        {"image": Image.new("RGB", (40, 30)), "expression": "a", "box": [4.0, 6.0, 8.0, 4.0], "placement": placement}
        for placement in (Placement(), Placement(0.5, 1.0, 0.0))
    ]
    batch = TASKS.get("rec")().collate(rows, backbone, np.random.default_rng(0))
    assert [int(mask.sum()) for mask in batch.images.mask] == [64 * 48, 32 * 24]
    assert batch.images.offset.tolist() == [[0, 8 / 64], [0.5, 0]]
    assert batch.extras["boxes"][1].tolist() == pytest.approx([0.5 + 8 / 80, 8 / 80, 8 / 80, 4 / 80])


def test_on_the_canvas_a_box_frames_what_it_framed_in_the_stored_image() -> None:
    """Boxes are right to a pixel after every cut and mirroring, at every size and place; the target is red on grey."""
    side = 320
    backbone = TransVG(TransVG.configured("transvg:tiny", {"image_size": side}))
    task = TASKS.get("rec")()
    picture = Image.effect_noise((400, 300), 40).convert("RGB")
    picture.paste((240, 40, 40), (150, 90, 270, 160))
    row = {"image": picture, "expression": "a dog", "box": [150.0, 90.0, 120.0, 70.0]}
    rows = task.augmented([row] * 60, "transvg", np.random.default_rng(0))
    batch = task.collate(rows, backbone, None)
    assert len({(r["image"].size, r["placement"].long_side) for r in rows}) > 25
    images, spread = batch.images, torch.tensor([[[0.229]], [[0.224]]])
    for i, (first, last) in enumerate(side * corners(batch.extras["boxes"]).unflatten(-1, (2, 2))):
        red, green = images.pixels[i, :2] * spread + torch.tensor([[[0.485]], [[0.456]]])
        apart = (red - green) * images.mask[i]
        found = (apart > apart.max() / 2).nonzero().flip(1)
        torch.testing.assert_close(found.min(0).values.float(), first, rtol=0, atol=1.01)
        torch.testing.assert_close(found.max(0).values.float() + 1, last, rtol=0, atol=1.01)


def test_a_backbone_without_a_canvas_takes_no_notice_of_placements() -> None:
    backbone = small_tiny()
    row = {"image": Image.new("RGB", (40, 30)), "expression": "a", "box": [4.0, 6.0, 8.0, 4.0]}
    plain, placed = (
        TASKS.get("rec")().collate([row | more], backbone, None) for more in ({}, {"placement": Placement(0.5)})
    )
    for name in ("pixels", "mask", "scale", "offset"):
        assert torch.equal(getattr(plain.images, name), getattr(placed.images, name))
