"""Weights and other files of BEiT-3: their sources, their names, and the errors if they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from petlbench.api.tokens import Images, Texts
from petlbench.backbones import beit3_weights as module
from petlbench.backbones.beit3 import BEiT3
from petlbench.backbones.beit3_weights import own_layout, published_names, resized_positions
from petlbench.core.errors import UserError
from tests.beit3_factory import Named, error, golden, random_tiny, tiny


def published(backbone: BEiT3) -> Named:
    """Return the state dict in the published layout, with q, k and v separate."""
    own, out = backbone.state_dict(), {}
    for name, parts in published_names(backbone.config.layers).items():
        for part, tensor in zip(parts, own[name].chunk(len(parts)) if len(parts) > 1 else [own[name]], strict=True):
            out[part] = tensor.clone()
    return out


@pytest.fixture
def source() -> BEiT3:
    return random_tiny(3)


def original_checkpoint(tensors: Named) -> Named:
    """Return the golden model as in a published file; the names come from the specification of the layout."""
    words = torch.zeros(210, 12, dtype=torch.float64)
    words[:40] = tensors["tok_emb"]
    out = {
        "beit3.text_embed.weight": words,
        "beit3.vision_embed.cls_token": tensors["cls"],
        "beit3.vision_embed.mask_token": tensors["mask_tok"],
        "beit3.vision_embed.proj.weight": tensors["patch_w"],
        "beit3.vision_embed.proj.bias": tensors["patch_b"],
        "beit3.encoder.embed_positions.A.weight": tensors["pos_v"],
        "beit3.encoder.embed_positions.B.weight": tensors["pos_t"],
        "vision_head.weight": tensors["head_v"],
        "language_head.weight": tensors["head_t"],
        "logit_scale": tensors["log_scale"],
    }
    for letter, ours in (("A", "v"), ("B", "t")):
        linear = {f"self_attn.{role}_proj.{letter}": role for role in "qkv"}
        linear |= {f"self_attn.out_proj.{letter}": "o", f"ffn.{letter}.fc1": "1", f"ffn.{letter}.fc2": "2"}
        norms = {f"self_attn.inner_attn_ln.{letter}": "lni", f"self_attn_layer_norm.{letter}": "ln1"}
        norms |= {f"final_layer_norm.{letter}": "ln2", f"ffn.{letter}.ffn_layernorm": "lnf"}
        for i in range(2):
            for name, short in linear.items():
                out[f"beit3.encoder.layers.{i}.{name}.weight"] = tensors[f"b{i}.{ours}.w{short}"]
                out[f"beit3.encoder.layers.{i}.{name}.bias"] = tensors[f"b{i}.{ours}.b{short}"]
            for name, short in norms.items():
                out[f"beit3.encoder.layers.{i}.{name}.weight"] = tensors[f"b{i}.{ours}.{short}_g"]
                out[f"beit3.encoder.layers.{i}.{name}.bias"] = tensors[f"b{i}.{ours}.{short}_b"]
        out[f"beit3.encoder.layer_norm.{letter}.weight"] = tensors[f"{ours}.lnF_g"]
        out[f"beit3.encoder.layer_norm.{letter}.bias"] = tensors[f"{ours}.lnF_b"]
    return out


def test_a_published_checkpoint_loads_by_path_and_computes_what_the_original_does(tmp_path: Path) -> None:
    tensors = golden("g4_model_plain")
    torch.save({"model": original_checkpoint(tensors), "epoch": 3}, path := tmp_path / "itc.pth")
    sizes = {"patch": 16, "width": 12, "attention_heads": 3, "ffn": 20, "text_positions": 16, "max_text": 14}
    loaded = tiny(weights=str(path), **sizes)
    assert not loaded.note and BEiT3.files(loaded.config)[0] == path
    images = Images(tensors["image"].float(), torch.ones(4, 32, 32, dtype=torch.bool), *torch.ones(2, 4, 2))
    head = loaded.own_heads["retrieval"]
    image = head.of_image(loaded.fuse(loaded.embed_image(images), task="retrieval"))
    text = head.of_text(
        loaded.fuse(loaded.embed_text(Texts(tensors["token_ids"], tensors["pad"] == 0)), task="retrieval")
    )
    assert error(image.double(), tensors["feat_v"]) < 1e-5 and error(text.double(), tensors["feat_t"]) < 1e-5
    assert error(head.similarity(image, text).double(), tensors["logits_image_to_text"]) < 1e-4


def test_our_own_layout_loads_by_path(source: BEiT3, tmp_path: Path) -> None:
    save_file(source.float().state_dict(), tmp_path / "own.safetensors")
    loaded = tiny(weights=str(tmp_path / "own.safetensors")).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())


def test_a_pretraining_checkpoint_leaves_the_heads_fresh_and_says_so(source: BEiT3, tmp_path: Path) -> None:
    tensors = {name: t for name, t in published(source.float()).items() if name.startswith("beit3.")}
    tensors["mlm_head.weight"] = torch.zeros(3)
    torch.save(tensors, path := tmp_path / "pretrained.pth")
    loaded = tiny(weights=str(path))
    assert "pretrained.pth" in loaded.note and "untrained" in loaded.note
    assert float(loaded.own_heads["retrieval"].image.weight.abs().max().detach()) <= 0.02
    assert torch.equal(loaded.image_embedding.cls, source.image_embedding.cls)
    with pytest.raises(UserError, match=r"pretrained\.pth have no retrieval heads to freeze"):
        tiny(weights=str(path), heads="frozen")


def test_another_image_size_interpolates_the_positions(source: BEiT3, tmp_path: Path) -> None:
    torch.save(published(source.float()), path := tmp_path / "itc.pth")
    loaded = tiny(weights=str(path), image_size=48)
    expected = resized_positions(source.image_embedding.positions.weight, 3 + 36)
    assert torch.equal(loaded.image_embedding.positions.weight, expected)
    assert torch.equal(loaded.text_embedding.positions.weight, source.text_embedding.positions.weight)


def test_a_checkpoint_that_does_not_fit_is_named_and_counted(source: BEiT3, tmp_path: Path) -> None:
    tensors = published(source.float())
    path = tmp_path / "wrong.pth"
    del tensors["beit3.encoder.layers.0.self_attn.k_proj.A.weight"], tensors["logit_scale"]
    tensors["beit3.encoder.surplus"] = torch.zeros(1)
    tensors["beit3.text_embed.weight"] = torch.zeros(9, 32)
    torch.save(tensors, path)
    with pytest.raises(UserError) as caught:
        tiny(weights=str(path))
    message = str(caught.value)
    assert "\n" not in message and "wrong.pth" in message
    assert "2 missing (" in message and "attention.core.qkv.image.weight" in message and "log_scale" in message
    assert "3 unexpected (" in message and "q_proj.A.weight" in message
    assert "text_embedding.tokens.weight is 9 x 32, not 210 x 32" in message


def test_conversion_leaves_our_own_names_alone() -> None:
    tensors = {"image_embedding.cls": torch.zeros(1)}
    assert own_layout(tensors, 2) == tensors


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty torch.hub folder, and go offline."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(module.hub, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub" / "checkpoints"


def test_offline_says_which_file_goes_where(no_network: Path) -> None:
    with pytest.raises(UserError, match=r"beit3_large_itc_patch16_224\.pth .*HF_HUB_OFFLINE") as caught:
        BEiT3(BEiT3.configured("beit3:large-224", {}))
    assert str(no_network) in str(caught.value) and "`weights`" in str(caught.value)
    backbone = tiny(tokenizer="pretrained", vocabulary=64_010)
    with pytest.raises(UserError, match=r"beit3\.spm .*HF_HUB_OFFLINE") as caught:
        backbone.texts(["a dog"], 8)
    assert str(no_network) in str(caught.value) and "`tokenizer`" in str(caught.value)
    for options, missing in (({}, "beit3_base_itc"), ({"weights": "none"}, r"beit3\.spm")):
        with pytest.raises(UserError, match=missing):  # before anything runs
            BEiT3.files(BEiT3.Config(**options))


def test_a_failed_download_is_one_line(no_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, target: str, **options: Any) -> None:
        assert url.endswith("/beit3/beit3.spm") and len(options["hash_prefix"]) == 64
        raise OSError("no route\nto host")

    monkeypatch.setattr(module.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match="no route to host") as caught:
        tiny(tokenizer="pretrained", vocabulary=64_010).texts(["a dog"], 8)
    assert "\n" not in str(caught.value)


def test_cached_files_are_used_and_fingerprinted(no_network: Path, source: BEiT3,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    no_network.mkdir(parents=True)
    monkeypatch.setitem(module.ITC, (32, 2), "small.pth")
    torch.save(published(source.float()), no_network / "small.pth")
    loaded = tiny(weights="pretrained")
    assert torch.equal(loaded.image_embedding.cls, source.image_embedding.cls)
    assert no_network / "small.pth" in BEiT3.files(loaded.config)


def test_sizes_without_a_published_checkpoint_are_refused() -> None:
    with pytest.raises(UserError, match="no weights of beit3 at width 32 with 2 layers"):
        tiny(weights="pretrained")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"image_size": 33}, "multiple of patch"), ({"attention_heads": 5}, "attention_heads"), ({"max_text": 65}, "65")],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny(**options)


def test_a_tokenizer_with_more_ids_than_rows_is_refused() -> None:
    with pytest.raises(UserError, match="210 ids, vocabulary only 100 rows"):
        tiny(vocabulary=100)
