"""Pre-train the embedded backbone on scenes of shapes: `python -m petlbench.commands.pretrain`, resumable.

Every step computes the losses of all four tasks on one batch of scenes; the image encoder runs once for the four. A
fifth loss uses text alone, as in BART's pre-training: it restores captions from noised ones. Half of the captions are
about digits, so that the language half knows the target domain's words while the visual half has never seen a digit.
Writes `model.safetensors`, `tokenizer.json` and `recipe.json` (recipe, seed, data fingerprint, curves, hash).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor, nn

from petlbench.api.decoding import token_losses
from petlbench.api.registries import TASKS
from petlbench.api.task import Row, Task
from petlbench.api.tokens import Images, Tokens
from petlbench.backbones.tiny import Tiny, TinyConfig
from petlbench.backbones.weights.tensors import ASSETS
from petlbench.backbones.weights.tokenizer import build_tokenizer
from petlbench.core.files import replacing
from petlbench.datasets.scenes.language import VOCABULARY, captions, expressions, questions
from petlbench.datasets.scenes.world import DIGITS, SHAPES, Scene, make_scene

TASK_NAMES = ("rec", "vqa", "captioning", "retrieval")


class PretrainRecipe(BaseModel):
    """The recipe of the packaged weights, which `make pretrain` repeats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = 4500
    batch_size: int = 48
    lr: float = 1e-3
    warmup_steps: int = 300
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    language_batch_size: int = 32
    pointing_from: int = 500  # from this step on, the loss of grounding also trains the pointing
    scenes: int = 24000
    validation_scenes: int = 256
    validate_every: int = 500
    save_every: int = 250
    seed: int = 0


class SharedImages(Tiny):
    """A Tiny that encodes a batch's images once for all tasks; `share` starts a new batch."""

    def share(self, images: Images) -> None:
        self._alone: Tokens | None = None
        self._tokens = super().embed_image(images, task="pretraining")

    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        return self._tokens

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        if len(parts) > 1 or parts[0] is not self._tokens:
            return super().fuse(*parts, task=task)
        if self._alone is None:
            self._alone = super().fuse(*parts, task=task)
        return self._alone


class SceneRows:
    """Rows of all four tasks from scenes of shapes. Images are kept; texts are drawn anew at every visit."""

    def __init__(self, recipe: PretrainRecipe, split: str, count: int) -> None:
        self.recipe, self.split, self.count = recipe, split, count
        self._kept: dict[int, Scene] = {}

    def scene(self, index: int) -> Scene:
        if index not in self._kept:
            self._kept[index] = make_scene("shapes", self.split, self.recipe.seed, index)
        return self._kept[index]

    def row(self, index: int, rng: np.random.Generator) -> Row:
        scene = self.scene(index)
        (expression, target), (question, answer, answer_type) = (
            expressions(scene, rng, 1)[0],
            questions(scene, rng, 1)[0],
        )
        return {
            "sample_id": str(index),
            "image_id": str(index),
            "image": Image.fromarray(scene.image),
            "expression": expression,
            "box": scene.objects[target].box,
            "question": question,
            "answers": [answer],
            "answer_type": answer_type,
            "captions": captions(scene, rng),
        }

    def batch(self, step: int) -> list[Row]:
        """Return the rows of one step: they depend on seed and step only, so that a resumed run sees the same."""
        size, seed = self.recipe.batch_size, self.recipe.seed
        epoch, place = divmod(step * size, self.count - self.count % size)
        order = np.random.default_rng([seed, 1, epoch]).permutation(self.count)
        rng = np.random.default_rng([seed, 2, step])
        return [self.row(int(i), rng) for i in order[place : place + size]]


def retold(caption: str, rng: np.random.Generator) -> str:
    """Turn half of the captions into ones about digits: each kind of shape becomes a random digit word."""
    if rng.random() < 0.5:
        return caption
    names = dict(zip(SHAPES, rng.permutation(list(DIGITS)), strict=False))
    return " ".join(str(names.get(word, word)) for word in caption.split())


def noise(text: str, rng: np.random.Generator) -> str:
    """Hide each word with probability 0.2."""
    return " ".join("<unk>" if rng.random() < 0.2 else word for word in text.split())


def pretraining_rate(recipe: PretrainRecipe, step: int) -> float:
    """Return the factor of the rate: a linear warm-up, then a cosine down to 0.01."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2


class Pretraining:
    """The state of a run: model, heads, optimizer, step and curves."""

    def __init__(self, recipe: PretrainRecipe, folder: Path, device: str) -> None:
        self.recipe, self.folder, self.device = recipe, folder, torch.device(device)
        torch.manual_seed(recipe.seed)
        folder.mkdir(parents=True, exist_ok=True)
        build_tokenizer(VOCABULARY).save(str(folder / "tokenizer.json"))
        config = TinyConfig(tokenizer=str(folder / "tokenizer.json"), weights="none")
        self.backbone = SharedImages(config).to(self.device)
        self.tasks: dict[str, Task] = {name: TASKS.get(name)() for name in TASK_NAMES}
        self.heads = nn.ModuleDict({name: task.head(self.backbone) for name, task in self.tasks.items()})
        self.heads.to(self.device)
        self.optimizer = self._optimizer()
        self.rows = SceneRows(recipe, "train", recipe.scenes)
        self.step = 0
        self.curves: list[dict[str, Any]] = []
        self.schedules: list[
            list[int]
        ] = []  # [first step, steps of the cosine]: a resumed run with other steps adds one
        self._resume()
        if not self.schedules or self.schedules[-1][1] != recipe.steps:
            self.schedules.append([self.step, recipe.steps])

    def _optimizer(self) -> torch.optim.AdamW:
        parameters = [*self.backbone.parameters(), *self.heads.parameters()]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.recipe.lr)

    def _parts(self) -> dict[str, Any]:
        return {"backbone": self.backbone, "heads": self.heads, "optimizer": self.optimizer}

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.curves, self.schedules = json.loads(state["history"])

    def checkpoint(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        with replacing(self.folder / "state.pt") as partial:
            torch.save({**state, "step": self.step, "history": json.dumps([self.curves, self.schedules])}, partial)

    def losses(self, rows: list[Row], rng: np.random.Generator) -> dict[str, Tensor]:
        batches = {name: task.collate(rows, self.backbone, rng).to(self.device) for name, task in self.tasks.items()}
        self.backbone.share(batches["rec"].images)
        losses = {name: self.tasks[name].loss(self.backbone, self.heads[name], b) for name, b in batches.items()}
        return {**losses, "language": self._language_loss(rows, rng)}

    def _language_loss(self, rows: list[Row], rng: np.random.Generator) -> Tensor:
        texts = [retold(row["captions"][0], rng) for row in rows[: self.recipe.language_batch_size]]
        noised = [noise(text, rng) for text in texts]
        source = self.backbone.texts(noised, max_length=40).to(self.device)
        target = self.backbone.texts(texts, max_length=40).to(self.device)
        memory = self.backbone.fuse(self.backbone.embed_text(source), task="language")
        return token_losses(self.backbone, memory, target, "language").sum() / target.mask.sum()

    def advance(self) -> dict[str, float]:
        """Take one optimizer step and return the losses as numbers."""
        self.backbone.train()
        grounding: Any = self.tasks["rec"]
        grounding.pointing = float(self.step >= self.recipe.pointing_from)
        rng = np.random.default_rng([self.recipe.seed, 3, self.step])
        losses = self.losses(self.rows.batch(self.step), rng)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * pretraining_rate(self.recipe, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_([*self.backbone.parameters(), *self.heads.parameters()], self.recipe.clip_norm)
        self.optimizer.step()
        self.step += 1
        return {name: float(loss.detach()) for name, loss in losses.items()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return each task's main metric on validation scenes."""
        self.backbone.eval()
        source = SceneRows(self.recipe, "validation", self.recipe.validation_scenes)
        rng = np.random.default_rng([self.recipe.seed, 4])
        rows = [source.row(i, rng) for i in range(source.count)]
        predictions: dict[str, list[Any]] = {name: [] for name in self.tasks}
        for start in range(0, len(rows), 64):
            for name, task in self.tasks.items():
                batch = task.collate(rows[start : start + 64], self.backbone, None).to(self.device)
                self.backbone.share(batch.images)
                predictions[name] += task.predict(self.backbone, self.heads[name], batch)
        scores = {name: task.score(rows, predictions[name]).metrics for name, task in self.tasks.items()}
        return {f"{name}.{task.main_metric}": scores[name][task.main_metric] for name, task in self.tasks.items()}

    def export(self) -> None:
        """Write weights and heads as safetensors, with the recipe beside them."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.backbone.state_dict().items()}
        for name, t in self.heads.state_dict().items():
            tensors[f"head.{name}"] = t.detach().cpu().contiguous()
        with replacing(self.folder / "model.safetensors") as partial:
            save_file(tensors, partial)
            partial.chmod(0o644)  # the library makes it private
        digest = hashlib.sha256((self.folder / "model.safetensors").read_bytes()).hexdigest()
        summary = {
            "recipe": self.recipe.model_dump(),
            "steps_done": self.step,
            "schedules": self.schedules,
            "weights_sha256": digest,
            "data_fingerprint": fingerprint(self.rows),
            "torch": torch.__version__.split("+")[0],
            "curves": self.curves,
        }
        (self.folder / "recipe.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def fingerprint(rows: SceneRows) -> str:
    """Return the SHA-256 of the first 64 scenes with their texts."""
    digest, rng = hashlib.sha256(), np.random.default_rng(0)
    for index in range(64):
        row = rows.row(index, rng)
        digest.update(row.pop("image").tobytes() + repr(sorted(row.items())).encode())
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m petlbench.commands.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS / "tiny", help="folder to resume from and to write to")
    parser.add_argument("--steps", type=int, default=PretrainRecipe().steps)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    run = Pretraining(PretrainRecipe(steps=options.steps), options.out, options.device)
    recipe, began, first = run.recipe, time.perf_counter(), run.step
    while run.step < recipe.steps:
        losses = run.advance()
        if run.step % 50 == 0:
            seconds = (time.perf_counter() - began) / (run.step - first)
            shown = " ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            print(f"step {run.step}/{recipe.steps} {seconds:.2f} s/step {shown}", flush=True)
        if run.step % recipe.validate_every == 0 or run.step == recipe.steps:
            run.curves.append({"step": run.step, "losses": losses, "validation": run.validate()})
            print(json.dumps(run.curves[-1]), flush=True)
        if run.step % recipe.save_every == 0 or run.step == recipe.steps:
            run.checkpoint()
            run.export()


if __name__ == "__main__":
    main()
