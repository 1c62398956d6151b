"""`vl_bart` and `vl_t5`: the library's own passes, published counts, and what can go wrong.

`test_golden.py` checks that whole models equal the authors'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, BartModel, BertConfig, BertModel, T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration, T5Model

from petlbench.api.sites import IMAGE, TEXT
from petlbench.api.tokens import Tokens, join, plain_tokens
from petlbench.backbones.parts import visual_block
from petlbench.backbones.parts.visual_block import VisualBlock, centres, pooled
from petlbench.backbones.vl_bart import VLBart, VLBartConfig
from petlbench.backbones.vl_t5 import VLT5, VLT5Config
from petlbench.backbones.weights import library_models
from petlbench.backbones.weights.library_codec import file_codec
from petlbench.backbones.weights.tensors import asset
from petlbench.core.errors import UserError
from tests.backbone_factory import draw, randomise
from tests.golden.checks.vl_pet_models import Given, given

Host = VLBart | VLT5
KINDS: dict[str, Any] = {"bart": VLBart, "t5": VLT5}
SMALL: dict[str, Any] = {"width": 32, "heads": 4, "ffn": 64, "cells": 2, "sentinels": 4, "added_rows": 8}


def close(ours: Tensor, theirs: Tensor, what: str = "", tolerance: float = 1e-9) -> None:
    """Return the largest |a - b| / max(1, largest |b|)."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)) <= tolerance, what


def built(family: str, **options: Any) -> Host:
    """Return a backbone smaller than the test size."""
    cls = KINDS[family]
    backbone: Host = cls(cls.configured(f"vl_{family}:tiny", SMALL | options))
    return backbone


def host(family: str, **options: Any) -> Host:
    """Return a random backbone in double precision and evaluation mode."""
    backbone = built(family, **options)
    randomise(backbone)
    return backbone.eval()


def test_without_boxes_the_box_branch_is_a_constant() -> None:
    block = VisualBlock(3, 8, 2, nn.LayerNorm).double()
    grids, table = draw(2, 1, 9, 3), draw(20, 8)
    assert torch.equal(block(grids, table), block(grids, table, torch.zeros(2, 1, 4, 4, dtype=torch.float64)))
    block(grids, table).square().sum().backward()
    assert not block.box.weight.grad.any() and block.box.bias.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(("side", "cells"), [(7, 6), (5, 4), (4, 4), (6, 3)])
def test_positions_are_the_centres_of_the_pooled_windows(side: int, cells: int) -> None:
    """An impulse in each grid cell shows which tokens see it."""
    seen = pooled(torch.eye(side * side).unsqueeze(0), cells)[0]  # (tokens, grid cells)
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    middle = torch.stack([(seen * axis).sum(1) / seen.sum(1) for axis in (column, row)], dim=-1)
    torch.testing.assert_close(centres(side, cells), (middle + 0.5) / side)


def test_an_image_becomes_tokens_with_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visual_block, "GridFeatures", partial(Given, 24, 3))
    backbone = host("bart")
    tokens = backbone.embed_image(given(draw(2, 9, 24)))
    assert tokens.states.shape == (2, 4, 32) and tokens.mask.all() and (tokens.types == IMAGE).all()
    assert tokens.segments == ((IMAGE, 4),)
    torch.testing.assert_close(tokens.positions[1], centres(3, 2).double())


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_cached_features_are_noted_and_change_little(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path))
    live, cached = built(family), built(family, features="cached")
    cached.load_state_dict(live.state_dict())
    assert "cached" in cached.note and "live" in live.note
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    ours, theirs = (backbone.embed_image(backbone.images([picture] * 2)) for backbone in (live, cached))
    assert ours.states.shape == (2, 4, 32)
    close(ours.states, theirs.states, tolerance=1e-2)
    assert torch.equal(ours.positions, theirs.positions) and not torch.equal(ours.states, theirs.states)


COUNTS = {
    "vl_bart": (141_156_864, 1_582_848, 50465, 13 + 19),
    "vl_t5": (224_540_160, 1_581_312, 32200, 25 + 37),
    "vl_bart:large": (406_291_456 - 50265 * 1024 + 50465 * 1024 + 2_110_464, 2_110_464, 50465, 25 + 37),
    "vl_t5:small": (60_506_624 + 72 * 512 + 1_054_208, 1_054_208, 32200, 13 + 19),
    "vl_t5:large": (737_668_096 + 72 * 1024 + 2_108_416, 2_108_416, 32200, 49 + 73),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name: str) -> None:
    """All parameters, those that every method trains, and the rows of the table; the CNN is not counted."""
    cls = KINDS[name.partition(":")[0][3:]]
    with torch.device("meta"):
        backbone = cls(cls.configured(name, {}))
    parameters = dict(backbone.named_parameters())
    total, hosts, rows, norms = COUNTS[name]
    assert sum(p.numel() for p in parameters.values()) == total
    assert sum(parameters[key].numel() for key in backbone.host_parameters()) == hosts
    assert len(backbone.word_table()) == len(backbone.codec) == rows
    assert sum(1 for role in backbone.roles() for _ in backbone.stack(role).norms()) == norms
    assert any(key.startswith("grid.") for key in backbone.state_dict())
    backbone.freeze()
    assert {key for key, p in parameters.items() if p.requires_grad} == backbone.host_parameters()


# Against the library's own models, saved and loaded as a user would.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small language models in the library's layout, with a tokenizer; by family."""
    sizes = {"d_model": 32, "vocab_size": 210}
    sides = {
        f"{side}_{k}": n
        for side in ("encoder", "decoder")
        for k, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    bart = BartForConditionalGeneration(BartConfig(**sizes, **sides, max_position_embeddings=128))
    t5 = T5ForConditionalGeneration(T5Config(**sizes, d_kv=16, d_ff=64, num_layers=2, num_heads=4, pad_token_id=1))
    tokenizer, saved = file_codec(asset("tiny/tokenizer.json")).tokenizer, {}
    for family, model in {"bart": bart, "t5": t5}.items():
        randomise(model, std=0.2).to(torch.float32 if family == "bart" else torch.float16)
        saved[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(saved[family])
        tokenizer.save_pretrained(saved[family])
    return saved


def loaded(family: str, source: Path | str, **options: Any) -> Host:
    """Return a backbone with the language model of `source`, and its tokenizer unless an option says otherwise."""
    return built(family, **{"language_weights": str(source), "tokenizer": None} | options)


def library(family: str, folder: Path) -> Any:
    cls = BartForConditionalGeneration if family == "bart" else T5ForConditionalGeneration
    return cls.from_pretrained(folder).double()


def fingerprint(tensor: Tensor) -> Tensor:
    """Return three numbers that differ between tensors: the sum, and two that depend on the order of values."""
    flat = tensor.detach().double().flatten()
    return torch.stack([flat.sum(), flat @ draw(len(flat)), flat @ draw(len(flat), seed=1)])


ASKED = ["a red circle on the left", "a square"]


@pytest.mark.parametrize(("family", "training"), [("bart", False), ("t5", False), ("t5", True)])
def test_text_alone_passes_as_through_the_librarys_model(folders: dict[str, Path], family: str, training: bool) -> None:
    """Compare encoder states and the decoder's logits; for T5 also in training, with the same dropout values."""
    backbone, model = loaded(family, folders[family]).double(), library(family, folders[family])
    assert all(module.training for module in backbone.stacks.modules())
    backbone.train(training)
    model.train(training)
    texts = backbone.texts(ASKED, 20)
    torch.manual_seed(3)
    memory = backbone.fuse(backbone.embed_text(texts), task="vqa")
    logits, _ = backbone.decode(memory, texts.ids, task="vqa")
    torch.manual_seed(3)
    theirs = model(input_ids=texts.ids, attention_mask=texts.mask.long(), decoder_input_ids=texts.ids)
    close(memory.states[texts.mask], theirs.encoder_last_hidden_state[texts.mask], tolerance=1e-12)
    close(logits[..., :210], theirs.logits, tolerance=1e-12)
    assert logits.shape[-1] == 218


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_pretrained_values_are_the_librarys_and_new_rows_are_random(folders: dict[str, Path], family: str) -> None:
    backbone = loaded(family, folders[family], added_rows=4000)
    model = (BartModel if family == "bart" else T5Model).from_pretrained(folders[family])
    ours = [p for key, p in backbone.named_parameters() if not key.startswith(("visual.", "token_embedding."))]
    theirs = [p for key, p in model.named_parameters() if key != "shared.weight"]
    assert sorted(p.tolist() for p in map(fingerprint, ours)) == sorted(p.tolist() for p in map(fingerprint, theirs))
    table = backbone.token_embedding.weight
    assert torch.equal(table[:210], model.shared.weight)
    std = {"bart": 0.02, "t5": 1.0}[family]
    new, image = table[210:].detach(), backbone.visual.image.weight.detach()
    assert abs(float(new.std()) / std - 1) < 0.02 and abs(float(new.mean())) < 0.02 * std
    assert abs(float(image.std()) / std - 1) < 0.4
    assert bool(backbone.visual.feature.bias.any()) == (family == "t5")  # BART's are zero, T5's as torch draws them
    assert all(p.requires_grad and p.dtype == torch.float32 for p in backbone.parameters())


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_tokenizer_knows_the_added_tokens_at_its_end(folders: dict[str, Path], family: str) -> None:
    backbone = loaded(family, folders[family])
    codec = backbone.codec
    names = [f"<{kind}_{i}>" for kind in ("extra_id", "vis_extra_id") for i in (3, 2, 1, 0)]
    assert codec.tokenizer.convert_tokens_to_ids(names) == list(range(210, 218))  # type: ignore[attr-defined]
    assert len(codec) == 218 == len(backbone.token_embedding.weight)
    assert (backbone.pad_id, backbone.eos_id, backbone.start_id) == (1, 2, {"bart": 2, "t5": 1}[family])
    ids = backbone.texts(["a red circle"], 20).ids[0].tolist()
    assert backbone.text_of([*ids, 217, 210]) == "a red circle"


def test_tokens_that_a_tokenizer_knows_are_not_added_again(folders: dict[str, Path], tmp_path: Path) -> None:
    """T5's tokenizer already has <extra_id_N>, and its table has more rows than ids."""
    tokenizer = file_codec(asset("tiny/tokenizer.json")).tokenizer
    tokenizer.add_tokens([f"<extra_id_{i}>" for i in (3, 2, 1, 0)], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    codec: Any = loaded("t5", folders["t5"], tokenizer=str(tmp_path)).codec
    assert len(codec.tokenizer) == 218 and codec.tokenizer.convert_tokens_to_ids("<vis_extra_id_0>") == 217


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    """Copy a saved model and change options of it."""
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("bart", {"ffn": 48}, "of another shape (decoder.layers.0.fc1.bias is [64], not [48]"),
    ("bart", {"width": 64}, "more)"),
    ("bart", {"encoder_layers": 3}, "16 missing (encoder.layers.2.fc1.bias"),
    ("bart", {"decoder_layers": 1}, "26 unexpected (model.decoder.layers.1."),
    ("bart", {"heads": 2}, "2 other (decoder_attention_heads is 4, not 2"),
    ("bart", {"vocabulary": 200}, "shared.weight is [210, 32], not [200, 32]"),
    ("t5", {"heads": 8, "head_width": 8}, "num_heads is 4, not 8"),
    ("t5", {"max_distance": 64}, "1 other (relative_attention_max_distance is 128, not 64)"),
    ("t5", {"encoder_layers": 1}, "8 unexpected (encoder.block.1."),
]


@pytest.mark.parametrize(("family", "options", "part"), WRONG)
def test_a_model_that_does_not_fit_is_an_error_of_one_line(
    folders: dict[str, Path], family: str, options: dict[str, Any], part: str
) -> None:
    with pytest.raises(UserError) as caught:
        loaded(family, folders[family], **options)
    message = str(caught.value)
    assert part in message and "do not fit this configuration" in message and "\n" not in message


def test_wrong_sources_are_an_error_of_one_line(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    bert, empty, torn = (tmp_path / name for name in ("bert", "empty", "torn"))
    for folder in (bert, empty, torn):
        folder.mkdir()
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(tiny).save_pretrained(bert)
    edited(folders["bart"], torn)
    (torn / "model.safetensors").write_bytes(b"torn")
    cases = {
        str(tmp_path / "nowhere"): "does not exist: give a folder in transformers' layout",
        str(bert / "config.json"): "is a file: give the folder",
        str(bert): "is a model of type 'bert', not 'bart'",
        str(empty): "does not hold a language model: give a folder",
        str(torn): "does not hold a language model that can be read",
        "facebook/bart-base": "is not on this machine and was not fetched (",
        "facebook/bart-bass": "did you mean 'facebook/bart-base'?",
    }
    for source, part in cases.items():
        with pytest.raises(UserError) as caught:
            loaded("bart", source)
        assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_is_fetched_when_needed_and_named_when_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = loaded("t5", "none")
    with pytest.raises(UserError, match=r"'google-t5/t5-base' is not on this machine .* holds a tokenizer"):
        backbone.texts(["a"], 4)
    backbone = host("bart", sentinels=5)
    with pytest.raises(UserError, match="220 ids with the added ones, more than the 218 rows"):
        _ = backbone.pad_id


def test_files_are_those_that_results_depend_on(folders: dict[str, Path], tmp_path: Path) -> None:
    config = VLBart.configured("vl_bart:tiny", {"language_weights": str(folders["bart"]), "tokenizer": None})
    assert [path.name for path in VLBart.files(config)] == ["model.safetensors", "tokenizer.json"]
    assert all(path.is_file() for path in VLBart.files(config))
    assert [path.name for path in VLT5.files(VLT5.configured("vl_t5:tiny", {}))] == ["tokenizer.json"]
    with pytest.raises(UserError, match="does not exist"):
        VLT5.files(VLT5.configured("vl_t5:tiny", {"weights": str(tmp_path / "none.safetensors")}))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_file_of_the_whole_backbone_gives_every_value_back(family: str, tmp_path: Path) -> None:
    backbone = host(family).float()
    path = tmp_path / "whole.pt"
    torch.save(backbone.state_dict(), path)
    again = built(family, weights=str(path))
    ours, theirs = again.state_dict(), backbone.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    torch.save({key: value for key, value in theirs.items() if not key.startswith("grid.")}, path)
    with pytest.raises(UserError, match=r"missing \(grid\."):
        built(family, weights=str(path))
    built(family, weights=str(path), vision_weights="none")


# Differences of T5.


def mixed(kinds: Sequence[int], masked: int | None = None) -> Tokens:
    """Return one token of each type, in this order."""
    parts = [
        plain_tokens(draw(1, 1, 32, seed=i), torch.ones(1, 1, dtype=torch.bool), kind) for i, kind in enumerate(kinds)
    ]
    tokens = join(parts)
    if masked is not None:
        tokens.mask[0, masked] = False
    return tokens


def test_distances_count_between_text_tokens_only() -> None:
    backbone = host("t5")
    assert isinstance(backbone, VLT5)
    attention: Any = backbone.stack("encoder").layers[0]["attention"].core.attention
    relative = attention.compute_bias(3, 3)
    for kinds in ([TEXT] * 3, [TEXT, TEXT, TEXT, IMAGE], [IMAGE, TEXT, TEXT, IMAGE, TEXT], [IMAGE, IMAGE]):
        bias = backbone.encoder_bias(mixed(kinds))
        text = torch.tensor([kind == TEXT for kind in kinds])
        both = text[:, None] & text
        assert bias.shape == (1, 4, len(kinds), len(kinds))
        assert torch.equal(bias[:, :, both], relative.flatten(2) if text.any() else relative[:, :, :0, 0])
        assert not bias[:, :, ~both].any()
    bias = backbone.encoder_bias(mixed([TEXT, TEXT, IMAGE], masked=1))
    bias = bias.detach()
    assert float(bias.max()) < 5 and bool((bias[..., 1] + 1e4).abs().max() < 5) and bool((bias[..., [0, 2]] > -5).all())
    assert float(backbone.memory_bias(mixed([TEXT, IMAGE], masked=0)).min()) == -1e9  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_decoding_in_pieces_is_decoding_at_once(family: str) -> None:
    backbone = host(family)
    memory = mixed([TEXT, TEXT, IMAGE], masked=0)
    ids = torch.tensor([[5, 8, 13, 21, 34, 55]])
    whole, _ = backbone.decode(memory, ids, task="vqa")
    cache, pieces = backbone.new_cache(), []
    for piece in ids.split([2, 1, 3], dim=1):
        logits, cache = backbone.decode(memory, piece, cache, task="vqa")
        pieces.append(logits)
    close(torch.cat(pieces, dim=1), whole, tolerance=1e-12)
    assert not torch.allclose(whole[:, 0], backbone.decode(memory, ids[:, :1] + 1, task="vqa")[0][:, 0])


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_checkpointing_changes_no_gradient(family: str) -> None:
    """Include the gradients of the relative tables, whose bias enters every layer from outside."""
    backbone, runs = host(family), []
    text = backbone.texts(ASKED, 20)
    for checkpointing in (False, True):
        for role in backbone.roles():
            backbone.stack(role).checkpointing = checkpointing
        memory = backbone.fuse(backbone.embed_text(text), task="vqa")
        loss = backbone.decode(memory, text.ids, task="vqa")[0].square().mean()
        named = {key: p for key, p in backbone.named_parameters() if not key.startswith("visual.")}
        runs.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    tables = [gradient for key, gradient in runs[0].items() if "relative" in key]
    assert len(tables) == (2 if family == "t5" else 0) and all(gradient.any() for gradient in tables)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_half_precision_stays_near(family: str) -> None:
    backbone = host(family).float()
    text = backbone.texts(ASKED, 20)

    @torch.no_grad()
    def logits() -> Tensor:
        return backbone.decode(backbone.fuse(backbone.embed_text(text), task="vqa"), text.ids, task="vqa")[0]

    exact = logits()
    with torch.autocast("cpu", torch.bfloat16):
        half = logits().float()
    assert half.isfinite().all() and float(F.cosine_similarity(half.flatten(), exact.flatten(), dim=0)) > 0.99


def test_options_are_checked() -> None:
    assert VLBartConfig().part(None) == "pretrained" and VLT5Config(weights="none").text_source() == "none"
    assert VLT5Config(weights="none").tokenizer_source() == "google-t5/t5-base"
    assert VLBartConfig(weights="none", language_weights="a/b").tokenizer_source() == "a/b"


def test_files_of_the_hub_are_fetched_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights: the first that exists in the library's order; a second call makes no request."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    config = VLT5.configured("vl_t5:tiny", {"language_weights": "google-t5/t5-small"})
    with pytest.raises(UserError, match=r"'google-t5/t5-small' is not on this machine .* holds a model"):
        VLT5.files(config)
    asked: list[str] = []

    def fetch(source: str, name: str, **_: Any) -> str | None:
        asked.append(name)
        return str(tmp_path / name) if name in ("pytorch_model.bin", "spiece.model", "tokenizer.json") else None

    monkeypatch.setattr(library_models, "cached_file", fetch)
    assert VLT5.files(config)[0] == tmp_path / "pytorch_model.bin"
    assert asked == ["model.safetensors", "pytorch_model.bin"]
    assert library_models.tokenizer_files("google-t5/t5-small") == [
        tmp_path / "tokenizer.json",
        tmp_path / "spiece.model",
    ]
    monkeypatch.setattr(library_models, "try_to_load_from_cache", lambda source, name: str(tmp_path / name))
    asked.clear()
    assert VLT5.files(config)[0] == tmp_path / "model.safetensors" and asked == []
    monkeypatch.setattr(library_models, "try_to_load_from_cache", lambda source, name: None)
    monkeypatch.setattr(library_models, "cached_file", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"holds none of model.safetensors, pytorch_model.bin"):
        VLT5.files(config)
