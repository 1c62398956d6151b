"""The packaged backbone matches its recipe, predicts well, and its pre-training can be repeated and resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from petlbench.api.registries import TASKS
from petlbench.backbones.tiny import Tiny, TinyConfig
from petlbench.backbones.weights.tensors import ASSETS
from petlbench.backbones.weights.tokenizer import build_tokenizer
from petlbench.commands.pretrain import (
    Pretraining,
    PretrainRecipe,
    SceneRows,
    fingerprint,
    noise,
    pretraining_rate,
    retold,
)
from petlbench.datasets.scenes.language import VOCABULARY, expressions
from petlbench.datasets.scenes.world import make_scene

TINY = ASSETS / "tiny"
RECIPE = json.loads((TINY / "recipe.json").read_text(encoding="utf-8"))
QUICK = {"batch_size": 4, "language_batch_size": 2, "scenes": 12, "validation_scenes": 4, "warmup_steps": 2}


def test_the_weights_are_those_that_the_recipe_describes() -> None:
    data = (TINY / "model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == RECIPE["weights_sha256"]
    assert len(data) <= 10 * 2**20
    assert RECIPE["steps_done"] >= 4000
    assert PretrainRecipe(**RECIPE["recipe"]) == PretrainRecipe()  # what `make pretrain` does


def test_the_data_and_the_tokenizer_are_still_those_it_was_trained_with() -> None:
    assert fingerprint(SceneRows(PretrainRecipe(), "train", 64)) == RECIPE["data_fingerprint"]
    packaged = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert packaged.get_vocab() == build_tokenizer(VOCABULARY).get_vocab()


def test_the_curves_cover_the_whole_run() -> None:
    steps = [point["step"] for point in RECIPE["curves"]]
    assert steps == sorted(steps) and steps[-1] == RECIPE["steps_done"]
    assert RECIPE["curves"][-1]["validation"]["rec.acc_50"] > RECIPE["curves"][0]["validation"]["rec.acc_50"]


@torch.no_grad()
def test_the_packaged_backbone_finds_shapes_it_has_never_seen() -> None:
    task, backbone = TASKS.get("rec")(), Tiny(TinyConfig()).eval()
    rows, rng = [], np.random.default_rng(0)
    for index in range(64):
        scene = make_scene("shapes", "test", 7, index)
        (text, target), *_ = expressions(scene, rng, 1)
        row = {"image": Image.fromarray(scene.image), "expression": text, "box": scene.objects[target].box}
        rows.append({**row, "sample_id": str(index)})
    head = task.head(backbone).eval()
    found = task.predict(backbone, head, task.collate(rows, backbone, None))
    assert task.score(rows, found).metrics["acc_50"] > 0.85


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    recipe = PretrainRecipe(steps=4, **QUICK)
    whole = Pretraining(recipe, tmp_path / "whole", "cpu")
    losses = [whole.advance() for _ in range(4)]
    first = Pretraining(recipe, tmp_path / "parts", "cpu")
    begun = [first.advance() for _ in range(2)]
    first.checkpoint()
    second = Pretraining(recipe, tmp_path / "parts", "cpu")
    assert second.step == 2
    assert begun + [second.advance() for _ in range(2)] == losses
    for name, value in whole.backbone.state_dict().items():
        assert torch.equal(value, second.backbone.state_dict()[name]), name


def test_a_backbone_loads_the_exported_file(tmp_path: Path) -> None:
    run = Pretraining(PretrainRecipe(steps=1, **QUICK), tmp_path, "cpu")
    run.advance()
    run.export()
    config = TinyConfig(weights=str(tmp_path / "model.safetensors"), tokenizer=str(tmp_path / "tokenizer.json"))
    loaded = Tiny(config)
    assert all(torch.equal(value, run.backbone.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert set(loaded.pretrained_heads) == {"rec", "retrieval"}


def test_images_are_encoded_once_for_all_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Pretraining(PretrainRecipe(steps=1, **QUICK), tmp_path, "cpu")
    calls = []
    real = run.backbone.image_tokenizer.forward
    monkeypatch.setattr(run.backbone.image_tokenizer, "forward", lambda images: (calls.append(1), real(images))[1])
    assert set(run.advance()) == {"rec", "vqa", "captioning", "retrieval", "language"}
    assert len(calls) == 1


def test_texts_about_digits_come_from_shapes_alone() -> None:
    rng = np.random.default_rng(0)
    texts = {retold("a red star and a blue star", rng) for _ in range(200)}
    assert "a red star and a blue star" in texts and len(texts) == 11
    assert all(text.split()[2] == text.split()[6] for text in texts)
    hidden = [word == "<unk>" for word in noise("word " * 2000, rng).split()]
    assert 0.17 < np.mean(hidden) < 0.23


def test_the_rate_rises_then_falls_to_one_per_cent() -> None:
    recipe = PretrainRecipe(steps=1000, warmup_steps=100)
    assert pretraining_rate(recipe, 49) == pytest.approx(0.5)
    assert pretraining_rate(recipe, 100) == pytest.approx(1.0)
    assert pretraining_rate(recipe, 1000) == pytest.approx(0.01)
