"""`clip`: same values as open_clip; its preprocessing, tokenizers, weights, and the models it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from petlbench.tasks.captioning import Captioning
from petlbench.tasks.rec import ReferringExpressions
from petlbench.tasks.retrieval import Retrieval
from petlbench.tasks.vqa import VisualQuestionAnswering
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from petlbench.api.decoding import generate
from petlbench.api.sites import Pass
from petlbench.api.task import Row, Task
from petlbench.api.tokens import Texts
from petlbench.backbones.clip import Clip
from petlbench.backbones.weights import open_clip_models as models
from petlbench.core.errors import UserError
from petlbench.pipeline.assembly import attach_head
from tests.backbone_factory import draw, randomise

VISION = models.TINY["tiny"]["vision_cfg"]
TEXT = {"context_length": 24, "vocab_size": 256, "width": 24, "heads": 2, "layers": 2, "pad_id": 1}
FULL_CONTEXT = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}


def timm(name: str, pool: str, proj: str) -> dict[str, Any]:
    return {"image_size": 160, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}


TOWERS: dict[str, dict[str, Any]] = {  # one of every kind of published model
    "test-averaged": {
        "vision_cfg": {
            **VISION,
            "pool_type": "avg",
            "final_ln_after_pool": True,
            "no_ln_pre": True,
            "ls_init_value": 1,
        },
        "text_cfg": {**FULL_CONTEXT, "ls_init_value": 1},
    },
    "test-argmax": {"vision_cfg": VISION, "text_cfg": {**TEXT, "pool_type": "argmax"}},
    "test-siglip": {
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": timm("test_vit3", "map", "none"),
        "text_cfg": {**FULL_CONTEXT, "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
    },
    "test-timm-mean": {
        "custom_text": True,
        "vision_cfg": timm("test_vit2", "", "linear"),
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "first", "proj_type": "none"},
    },
    "test-timm-token": {"vision_cfg": timm("test_vit", "token", ""), "text_cfg": {**TEXT, "pool_type": "eos"}},
}
WIDTHS = {"test-siglip": 96, "test-timm-mean": 24}
DUAL = ["tiny", *TOWERS]
EVERY = [*DUAL, "coca-tiny"]
TEXTS = ["a red circle above a small blue square on the left", "two", "the green triangle"]
SIZES = [(64, 48), (33, 47), (50, 50)]


@pytest.fixture(scope="module", autouse=True)
def towers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Add the test towers to open_clip by name."""
    folder = tmp_path_factory.mktemp("towers")
    for name, config in TOWERS.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": WIDTHS.get(name, 16), **config}))
    open_clip.add_model_config(folder)


def configured(name: str, **options: Any) -> Any:
    return Clip.configured("clip", {"model": name, "weights": "none", "tokenizer": "tiny/tokenizer.json"} | options)


def pair(name: str, folder: Path) -> tuple[Any, Clip]:
    """Return open_clip's model and ours with the same random weights, from a file in open_clip's layout."""
    library = randomise(models.build(name, None), std=0.2).float()
    save_file(library.state_dict(), folder / "model.safetensors")
    torch.manual_seed(1)
    ours = Clip(configured(name, weights=str(folder / "model.safetensors")))
    return library.double().eval(), ours.double().eval()


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pictures() -> list[Image.Image]:
    return [noise(*size) for size in SIZES]


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1))


def padded(texts: Texts, length: int) -> Tensor:
    """Return ids padded to the full context, as the library takes them."""
    return nn.functional.pad(texts.ids, (0, length - texts.ids.shape[1]), value=1)


def embedded(ours: Clip) -> tuple[Tensor, Tensor]:
    head = ours.own_heads["retrieval"]
    tokens = ours.embed_image(ours.images(pictures()).to_dtype(torch.float64))
    image = head.of_image(ours.fuse(tokens, task="retrieval"))
    return image, head.of_text(ours.fuse(ours.embed_text(ours.texts(TEXTS, 20)), task="retrieval"))


@pytest.mark.parametrize("name", EVERY)
def test_both_towers_are_the_librarys(name: str, tmp_path: Path) -> None:
    """Compare embeddings and their gradients of every parameter; each parameter occurs once in the module tree."""
    library, ours = pair(name, tmp_path)
    image, text = embedded(ours)
    pixels = ours.images(pictures()).pixels.double()
    expected = library.encode_image(pixels, normalize=True)
    expected_text = library.encode_text(padded(ours.texts(TEXTS, 20), ours.max_text), normalize=True)
    assert error(image, expected) < 1e-12 and error(text, expected_text) < 1e-12
    assert all(error(e[0], e[1]) > 1e-3 for e in (expected, expected_text))
    scale = ours.own_heads["retrieval"].scale()
    assert error(scale, library.logit_scale.exp().squeeze()) < 1e-12
    with torch.no_grad():
        ours.own_heads["retrieval"].logit_scale.fill_(5.0)
    assert error(ours.own_heads["retrieval"].scale(), torch.tensor(100.0).double()) < 1e-12
    ours.own_heads["retrieval"].logit_scale.data.copy_(library.logit_scale)
    weight = draw(*image.shape)
    ((image + text) * weight).sum().backward()
    ((expected + expected_text) * weight).sum().backward()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in library.parameters())
    found = {p.detach().numpy().tobytes(): p for p in ours.parameters()}
    missing = [n for n, p in library.named_parameters() if p.detach().numpy().tobytes() not in found]
    assert all(n.startswith("text_decoder.cross_attn") and ".attn.in_proj" in n for n in missing)
    compared = 0
    for parameter in library.parameters():
        own = found.get(parameter.detach().numpy().tobytes())
        if own is not None and parameter.grad is not None:
            assert own.grad is not None and error(own.grad, parameter.grad) < 1e-11
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("name", EVERY)
def test_a_text_does_not_depend_on_its_batch(name: str, tmp_path: Path) -> None:
    _, ours = pair(name, tmp_path)
    head = ours.own_heads["retrieval"]
    together = head.of_text(ours.embed_text(ours.texts(TEXTS, 20)))
    alone = torch.cat([head.of_text(ours.embed_text(ours.texts([text], 20))) for text in TEXTS])
    assert error(alone, together) < 1e-12


def test_tokens_have_positions_and_a_mark(tmp_path: Path) -> None:
    ours = Clip(configured("tiny"))
    tokens = ours.embed_image(ours.images(pictures()))
    assert tokens.states.shape == (3, 17, ours.width) and bool(tokens.mask.all())
    assert tokens.mark is not None and tokens.mark.tolist() == [0, 0, 0]
    assert tokens.positions[0, 0].tolist() == [0.5, 0.5]
    assert tokens.positions[0, 1].tolist() == [0.125, 0.125] and tokens.positions[0, 2].tolist() == [0.375, 0.125]
    texts = ours.texts(TEXTS, 20)
    text = ours.embed_text(texts)
    assert text.states.shape == (*texts.ids.shape, ours.text_width) and ours.text_width != ours.width
    assert text.mark is not None and text.mark.tolist() == (texts.mask.sum(1) - 1).tolist()
    averaged = Clip(configured("test-averaged"))
    tokens = averaged.embed_image(averaged.images(pictures()))
    assert tokens.mark is None and tokens.states.shape[1] == tokens.positions.shape[1] == 16
    pooled = Clip(configured("coca-tiny"))
    tokens = pooled.embed_image(pooled.images(pictures()))
    assert tokens.states.shape == (3, 5, pooled.width) and tokens.mask[0].tolist() == [False] + [True] * 4
    assert tokens.mark is not None and tokens.mark.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["tiny", "test-averaged", "test-siglip", "coca-tiny"])
def test_the_output_of_a_sublayer_is_what_is_added(name: str) -> None:
    """Check every layer of every stack: layer scale is part of the output."""
    ours = randomise(Clip(configured(name))).eval()
    for role in ours.roles():
        stack = ours.stack(role)
        x, sites = (
            draw(2, 5, stack.width),
            [(i, n, "output") for i, layer in enumerate(stack) for n, _ in layer.items()],
        )
        context = Pass(memory=draw(2, 3, ours.width, seed=1))
        y, taps = stack.run(x, context, stop=len(stack.layers) - 1, taps=sites)
        before = {site: value for site, value in taps.items() if site[0] < len(stack.layers) - 1}
        assert error(x + sum(before.values()), y) < 1e-12


def test_captions_of_coca_are_the_librarys(tmp_path: Path) -> None:
    """Decode all words at once, and one by one from a cache whose rows change places."""
    library, ours = pair("coca-tiny", tmp_path)
    texts = ours.texts(TEXTS, 20)
    images = ours.images(pictures()).to_dtype(torch.float64)
    with torch.no_grad():
        logits = library(images.pixels, padded(texts, ours.max_text))["logits"]
        memory = ours.fuse(ours.embed_image(images), task="captioning")
        found, _ = ours.decode(memory, texts.ids, task="captioning")
        length = texts.ids.shape[1]
        assert error(found[texts.mask], logits[:, :length][texts.mask]) < 1e-12
        other, _ = ours.decode(memory, texts.ids.roll(1, 0), task="captioning")
        assert error(other, found) > 1e-3
        cache, order = ours.new_cache(), torch.tensor([2, 0, 1])
        for step in range(length):
            if step == 3:
                cache = ours.reorder_cache(cache, order)
            rows = order if step >= 3 else torch.arange(3)
            ids = texts.ids[rows, step : step + 1]
            one, cache = ours.decode(memory if step < 3 else _rows(memory, order), ids, cache, task="captioning")
            assert one.shape == (3, 1, 256) and error(one[:, 0], found[rows, step]) < 1e-12


def _rows(tokens: Any, order: Tensor) -> Any:
    return type(tokens)(tokens.states[order], tokens.mask[order], tokens.types[order], tokens.positions[order])


def test_what_weights_leave_open_is_drawn_from_the_seed() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(Clip(configured("coca-tiny")).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert all(bool(tensor.isfinite().all()) and float(tensor.abs().max()) < 10 for tensor in states[0].values())


@pytest.mark.parametrize("beams", [1, 2])
def test_beams_of_coca_end(beams: int) -> None:
    ours = randomise(Clip(configured("coca-tiny"))).eval()
    memory = ours.embed_image(ours.images(pictures()).to_dtype(torch.float64))
    found = generate(ours, memory, task="captioning", max_length=6, beams=beams)
    assert len(found) == 3 and all(len(ids) <= 6 for ids in found)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_is_the_librarys(mode: str, interpolation: str) -> None:
    """Also check that a box moves with the pixels."""
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    ours = models.Preprocessing(32, mean, std, interpolation, mode, 7)
    transform = open_clip.image_transform(
        32, is_train=False, mean=mean, std=std, resize_mode=mode, interpolation=interpolation, fill_color=7
    )
    for image in [*pictures(), noise(35, 32), noise(31, 7), noise(1, 9), noise(90, 20).convert("L")]:
        pixels, mask, _, _ = ours(image)
        assert float((pixels - transform(image)).abs().max()) < 1e-6
        assert bool(mask.all()) == (mode != "longest" or image.width == image.height)
    plain = models.Preprocessing(32, (0.0,) * 3, (1.0,) * 3, interpolation, mode, 0)
    image = Image.new("RGB", (96, 64))
    image.paste((255, 255, 255), (40, 24, 56, 40))  # at the centre (48, 32)
    pixels, _, scale, offset = plain(image)
    weight = pixels[0] / pixels[0].sum()
    middle = torch.stack([weight.sum(0), weight.sum(1)]) @ ((torch.arange(32) + 0.5) / 32)
    assert float((torch.tensor([48.0, 32.0]) * scale + offset - middle).abs().max()) < 1e-2
    width = (pixels[0].max(0).values > 0.5).sum() / 32
    assert abs(float(16 * scale[0] - width)) < 0.1


def test_published_weights_say_their_preprocessing_and_activation() -> None:
    with torch.device("meta"):
        openai, other = (Clip(Clip.configured("clip", {"tag": tag})) for tag in ("openai", "laion2b_s34b_b88k"))
        siglip = Clip(Clip.configured("clip:ViT-B-16-SigLIP", {}))
    names = [type(m.stack("text").layers[0]["ffn"].core.module.gelu).__name__ for m in (openai, other)]
    assert names == ["QuickGELU", "GELU"]
    assert openai.preprocessing.resize_mode == "shortest" and siglip.preprocessing.resize_mode == "squash"
    assert siglip.preprocessing.mean == (0.5, 0.5, 0.5) != openai.preprocessing.mean
    assert siglip.fixed_parameters() == {"logit_bias"} and openai.fixed_parameters() == set()


COUNTS = {
    "ViT-B-16": 149_620_737,
    "ViT-L-14": 427_616_513,
    "ViT-B-16-SigLIP": 203_155_970,
    "coca_ViT-B-32": 253_560_065,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_build_without_memory_and_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        ours = Clip(Clip.configured(f"clip:{name}", {}))
    assert sum(p.numel() for p in ours.parameters()) == COUNTS[name]
    assert all(p.is_meta for p in ours.parameters())
    text = 24 if name == "ViT-L-14" else 12
    assert len(ours.stack("vision").layers) == text and len(ours.stack("text").layers) == 12
    if name == "ViT-B-16":
        assert sum(p.numel() for p in ours.own_heads.parameters()) == 655_361
        assert Clip.configured("clip", {}).model == name


def test_clips_own_tokenizer() -> None:
    codec = models.codec_of("ViT-B-16", None)
    ids, mask = codec.encode(["a red circle", "two small blue squares on the left of it"], 7)
    whole = open_clip.get_tokenizer("ViT-B-16")(["a red circle"])
    assert ids.shape == (2, 7) and ids[0].tolist() == whole[0, :7].tolist()
    assert ids[1, -1] == codec.eos_id and mask.tolist() == [[True] * 5 + [False] * 2, [True] * 7]
    assert codec.decode(ids[0].tolist()) == "a red circle"
    assert ids[0, 0] == codec.start_id and len(codec) == 49408
    assert codec.encode(["two"], 77)[0].shape == (1, 3)


def test_a_tokenizer_of_the_hub_is_loaded_when_used_and_can_be_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    codec = models.codec_of("ViT-B-16-SigLIP", None)
    with pytest.raises(UserError, match=r"tokenizer timm/ViT-B-16-SigLIP .* give tokenizer: FOLDER") as caught:
        codec.encode(["a"], 8)
    assert "\n" not in str(caught.value)
    tiny = models.codec_of("tiny", "tiny/tokenizer.json")
    tiny.tokenizer.save_pretrained(tmp_path / "tokenizer")  # type: ignore[attr-defined]
    codec = models.codec_of("ViT-B-16-SigLIP", str(tmp_path / "tokenizer"))
    ids, mask = codec.encode(["a red circle", "Two!"], 8)
    assert ids.shape == mask.shape and mask.sum(1).tolist() == [5, 3] and ids[1, 2] == codec.eos_id == 2
    assert codec.decode(ids[0].tolist()) == "a red circle" and codec.pad_id == 1
    assert Clip.files(configured("tiny", tokenizer=str(tmp_path / "tokenizer")))[-1].parent == tmp_path / "tokenizer"


def test_weights_in_our_own_layout_and_those_that_do_not_fit(tmp_path: Path) -> None:
    ours = randomise(Clip(configured("coca-tiny"))).float()
    save_file(ours.state_dict(), tmp_path / "own.safetensors")
    other = Clip(configured("coca-tiny", weights=str(tmp_path / "own.safetensors")))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in ours.state_dict().items())
    library = models.build("tiny", None).state_dict()
    gone = {name: tensor for name, tensor in library.items() if name != "ln_final.weight"}
    for broken, message in [
        (gone, r"1 missing \(ln_final.weight\)"),
        (library | {"extra": torch.zeros(1)}, r"1 unexpected \(extra\)"),
        (library | {"visual.proj": torch.zeros(3, 3)}, r"1 of another shape \(visual.proj is 3 x 3, not 32 x 16\)"),
    ]:
        torch.save({"state_dict": broken}, tmp_path / "broken.pt")
        with pytest.raises(UserError, match=message) as caught:
            Clip(configured("tiny", weights=str(tmp_path / "broken.pt")))
        assert "\n" not in str(caught.value)


def test_published_weights_that_cannot_be_fetched_say_where_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for tag, where in [
        ("openai", r"open_clip_model.safetensors of timm/\S+ into the hub's cache \(HF_HOME"),
        (URL, URL),
    ]:
        with pytest.raises(UserError, match=rf"weights '{tag}' of .* cannot be fetched .*{where}") as caught:
            models.published_file("ViT-B-32-quickgelu" if tag == URL else "ViT-B-16", tag)
        assert "\n" not in str(caught.value) and str(caught.value).endswith("or give weights: FILE")


URL = "laion400m_e31"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("RN50", {}, "no plain vision transformer"),
        ("convnext_base", {"weights": "none"}, "no plain vision transformer"),
        ("EVA02-B-16", {}, "no plain vision transformer"),
        ("roberta-ViT-B-32", {}, "text tower of transformers"),
        ("ViT-B-16", {"tag": "opena"}, "did you mean 'openai'"),
        ("ViT-M-16", {}, "no published weights"),
    ],
)
def test_models_that_cannot_be_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        Clip.configured(f"clip:{name}", options)
    assert len(caught.value.errors()) == 1 and "\n" not in caught.value.errors()[0]["msg"]


def test_a_name_that_does_not_exist_gets_the_closest() -> None:
    with pytest.raises(UserError, match="did you mean 'ViT-B-16'"):
        Clip.options_of("ViT-B16")
    assert Clip.options_of("") == {} and Clip.options_of("ViT-L-14") == {"model": "ViT-L-14"}


def data() -> list[Row]:
    return [
        {
            "sample_id": f"s{i}",
            "image_id": f"i{i}",
            "image": image,
            "expression": TEXTS[i],
            "question": TEXTS[i],
            "box": [3.0 * i, 2.5, image.width / 3, image.height / 2],
            "answers": [["red"], ["two"] * 10, ["left", "right"]][i],
            "answer_type": "other",
            "captions": [TEXTS[i]],
        }
        for i, image in enumerate(pictures())
    ]


KINDS: list[type[Task]] = [Retrieval, VisualQuestionAnswering, Captioning]
SERVED = [(name, cls) for name in ("tiny", "test-siglip", "coca-tiny") for cls in KINDS]
SERVED += [("tiny", ReferringExpressions), ("test-averaged", ReferringExpressions)]


@pytest.mark.parametrize(("name", "cls"), SERVED)
@pytest.mark.parametrize("full", [True, False])
def test_tasks_train_and_predict(name: str, cls: type[Task], full: bool) -> None:
    task, ours = cls(), Clip(configured(name))
    assert task.refuses(Clip, ours.config) is None
    ours.unfreeze() if full else ours.freeze()
    adapted, head = attach_head(ours, task, torch.device("cpu"))
    batch = task.collate(data(), adapted, np.random.default_rng(0))
    loss = task.loss(adapted, head, batch)
    assert 0 < float(loss.detach()) < 1e3
    loss.backward()
    own = dict(ours.named_parameters())
    vision = [p for n, p in own.items() if n.startswith("stacks.vision")]
    assert (
        all(p.grad is not None and bool(p.grad.any()) for p in vision) if full else all(p.grad is None for p in vision)
    )
    trained = [p for p in head.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    # CoCa's own head for words is its projection to them; the others get a supplied decoder instead.
    assert bool(trained) == (cls in (Retrieval, ReferringExpressions) or name == "coca-tiny")
    assert own.get("logit_bias") is None or own["logit_bias"].grad is None
    with torch.no_grad():
        predictions = task.predict(adapted.eval(), head.eval(), task.collate(data(), adapted, None))
    assert len(predictions) == 3
    task.score([{k: v for k, v in row.items() if k != "image"} for row in data()], predictions)


def test_the_heads_can_stay_frozen() -> None:
    for heads, trained in [("trained", True), ("frozen", False)]:
        ours = Clip(configured("tiny", heads=heads))
        ours.freeze()
        _, head = attach_head(ours, Retrieval(), torch.device("cpu"))
        assert {p.requires_grad for p in head.parameters()} == {trained}


def test_coca_is_not_asked_for_boxes() -> None:
    message = ReferringExpressions().refuses(Clip, configured("coca-tiny"))
    assert message == "it cannot ground (CoCa's image tokens have no place)"
