"""BEiT-3 against the original modules: blocks, model, loss, first values; its sites, inputs and sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from petlbench.methods.lora import LoRA
from petlbench.tasks.rec import PointingHead
from petlbench.tasks.retrieval import contrastive_loss
from PIL import Image
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from petlbench.backbones.base import Images, Texts, Tokens
from petlbench.backbones.beit3 import BEiT3
from petlbench.backbones.beit3_weights import resized_positions
from petlbench.backbones.multiway import Routed, multiway_layer, multiway_stack
from petlbench.backbones.sites import IMAGE, TEXT, Pass, ProjectionPair
from petlbench.backbones.vision import additive
from petlbench.measure.parameters import count
from petlbench.method import adapt
from petlbench.spec import Recipe
from petlbench.training import optimizer, rate
from tests.backbone_factory import draw, randomise
from tests.beit3_factory import Named, error, golden, golden_json, random_tiny, tiny

GRADIENT = "grad_"
KINDS = {"v": "image", "t": "text"}


def a_batch(backbone: BEiT3) -> tuple[Tokens, Tokens]:
    """A text with padding, and an image."""
    texts = backbone.texts(["a red circle", "a blue square on the left of the ring"], 20)
    images = Images(draw(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool), *torch.ones(2, 2, 2).double())
    return backbone.embed_text(texts), backbone.embed_image(images)


# ---- the original's blocks and model


def names_of_layer(layer: str, block: str) -> dict[str, list[str]]:
    """Our parameters of one layer to the golden ones, which stand one above another in ours."""
    names = {}
    for short, kind in KINDS.items():
        for value, letter in (("weight", "w"), ("bias", "b")):
            gain = "g" if value == "weight" else "b"
            attention, ffn, theirs = f"{layer}sublayers.attention", f"{layer}sublayers.ffn", f"{block}{short}."
            mlp = f"{ffn}.core.module.{kind}"
            names |= {
                f"{attention}.norm.{kind}.{value}": [f"{theirs}ln1_{gain}"],
                f"{attention}.core.qkv.{kind}.{value}": [f"{theirs}{letter}{role}" for role in "qkv"],
                f"{attention}.core.norm.{kind}.{value}": [f"{theirs}lni_{gain}"],
                f"{attention}.core.proj.{kind}.{value}": [f"{theirs}{letter}o"],
                f"{ffn}.norm.{kind}.{value}": [f"{theirs}ln2_{gain}"],
                f"{mlp}.fc1.{value}": [f"{theirs}{letter}1"],
                f"{mlp}.norm.{value}": [f"{theirs}lnf_{gain}"],
                f"{mlp}.fc2.{value}": [f"{theirs}{letter}2"],
            }
    return names


def stacked(tensors: Named, names: list[str]) -> Tensor:
    return tensors[names[0]] if len(names) == 1 else torch.cat([tensors[name] for name in names])


def fill(module: nn.Module, names: dict[str, list[str]], tensors: Named) -> None:
    """Golden values into all parameters; golden tables with fewer rows than ours go to the top."""
    module.double()
    assert set(names) == {name for name, _ in module.named_parameters()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = stacked(tensors, names[name])
            (parameter[: len(value)] if value.ndim else parameter).copy_(value)


def check_gradients(module: nn.Module, names: dict[str, list[str]], tensors: Named) -> None:
    """Every gradient, and none where the original has none."""
    for name, parameter in module.named_parameters():
        parts = [GRADIENT + part for part in names[name]]
        if parts[0] not in tensors:
            assert parameter.grad is None, name
            continue
        expected = stacked(tensors, parts)
        assert parameter.grad is not None, name
        ours = parameter.grad[: len(expected)] if parameter.ndim else parameter.grad
        assert error(ours, expected) < 1e-9, name
        assert parameter.ndim == 0 or not parameter.grad[len(expected) :].any()


class Recorded(nn.Module):
    """Drop-path with the masks that the original drew."""

    def __init__(self, kept: Tensor, p: float) -> None:
        super().__init__()
        self.kept, self.p = kept, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept / (1 - self.p) if self.training else x


@pytest.mark.parametrize("kind", ["vision", "text", "fused2"])
def test_a_block_equals_the_original(kind: str) -> None:
    tensors = golden(f"g3_block_plain_{kind}")
    stack = multiway_stack(width=12, layers=1, heads=int(tensors["heads"]), ffn=20, drop_path=0.0)
    layer, names = stack.layers[0], names_of_layer("", "")
    present = {part for parts in names.values() for part in parts} <= set(tensors)
    if not present:  # a pass over one modality comes with its weights only; the other's must not matter
        other = "t." if kind == "vision" else "v."
        tensors |= {other + key[2:]: torch.full_like(t, torch.nan) for key, t in tensors.items() if key[1:2] == "."}
    fill(layer, names, tensors)
    for name in ("attention", "ffn"):
        short = "attn" if name == "attention" else "ffn"
        layer[name].drop = Recorded(tensors[f"path_mask_{short}"], float(tensors["p_path"]))
    segments = {"vision": ((IMAGE, 6),), "text": ((TEXT, 6),), "fused2": ((IMAGE, 2), (TEXT, 4))}[kind]
    mask = tensors["pad"] == 0
    context = Pass(mask=mask, segments=segments, bias=additive(mask, torch.float64))

    h = tensors["h"].requires_grad_()
    assert error(layer.train()(h, context)[0], tensors["out_train"]) < 1e-9
    y, _ = layer.eval()(h, context)
    assert error(y, tensors["out"]) < 1e-9
    (y * tensors["gy"]).sum().backward()
    assert error(h.grad, tensors["grad_h"]) < 1e-9
    check_gradients(layer, names, tensors)


def names_of_model() -> dict[str, list[str]]:
    names = {
        "own_heads.retrieval.log_scale": ["log_scale"],
        "own_heads.retrieval.image.weight": ["head_v"],
        "own_heads.retrieval.text.weight": ["head_t"],
        "image_embedding.cls": ["cls"],
        "image_embedding.mask_token": ["mask_tok"],
        "image_embedding.patches.weight": ["patch_w"],
        "image_embedding.patches.bias": ["patch_b"],
        "image_embedding.positions.weight": ["pos_v"],
        "text_embedding.tokens.weight": ["tok_emb"],  # 40 of our 210 rows
        "text_embedding.positions.weight": ["pos_t"],
        **names_of_layer("stacks.encoder.layers.0.", "b0."),
        **names_of_layer("stacks.encoder.layers.1.", "b1."),
    }
    for short, kind in KINDS.items():
        names[f"stacks.encoder.final_norm.{kind}.weight"] = [f"{short}.lnF_g"]
        names[f"stacks.encoder.final_norm.{kind}.bias"] = [f"{short}.lnF_b"]
    return names


def golden_model() -> tuple[BEiT3, dict[str, list[str]], Named]:
    tensors = golden("g4_model_plain")
    backbone = tiny(
        image_size=32, patch=16, width=12, layers=2, attention_heads=3, ffn=20, text_positions=16, max_text=14
    )
    names = names_of_model()
    fill(backbone, names, tensors)
    return backbone, names, tensors


def golden_inputs(backbone: BEiT3, tensors: Named) -> tuple[Tokens, Tokens]:
    image = tensors["image"]
    images = Images(image, torch.ones(4, 32, 32, dtype=torch.bool), *torch.ones(2, 4, 2).double())
    return backbone.embed_text(Texts(tensors["token_ids"], tensors["pad"] == 0)), backbone.embed_image(images)


def test_the_retrieval_model_equals_the_original() -> None:
    """Hidden states of both towers, features, logits, loss and every gradient."""
    backbone, names, tensors = golden_model()
    text, image = golden_inputs(backbone, tensors)
    stack, head = backbone.stack("encoder"), backbone.own_heads["retrieval"]
    for short, part in (("v", image), ("t", text)):
        assert error(part.states, tensors[f"hid_{short}_0"]) < 1e-9
        context = Pass(segments=part.segments, bias=additive(part.mask, torch.float64))
        _, taps = stack.run(part.states, context, taps=[(0, "ffn", "normed"), (1, "ffn", "normed")])
        for depth, states in enumerate(taps.values(), start=1):
            assert error(states, tensors[f"hid_{short}_{depth}"]) < 1e-9
    image, text = (backbone.fuse(part, task="retrieval") for part in (image, text))
    assert error(image.states, tensors["enc_v"]) < 1e-9 and error(text.states, tensors["enc_t"]) < 1e-9
    v, t = head.of_image(image), head.of_text(text)
    assert error(v, tensors["feat_v"]) < 1e-9 and error(t, tensors["feat_t"]) < 1e-9
    logits = head.similarity(v, t)
    assert error(logits, tensors["logits_image_to_text"]) < 1e-9
    loss = contrastive_loss(logits, torch.eye(4, dtype=torch.bool))
    assert error(loss, tensors["loss"]) < 1e-9
    loss.backward()
    check_gradients(backbone, names, tensors)


def test_a_fused_pass_equals_the_original_in_our_order() -> None:
    backbone, _, tensors = golden_model()
    text, image = golden_inputs(backbone, tensors)
    expected = tensors["enc_fused"]
    fused = backbone.fuse(text, image, task="vqa")
    assert error(fused.states, torch.cat([expected[:, 5:], expected[:, :5]], dim=1)) < 1e-9
    assert error(fused.pooled(), expected[:, 0]) < 1e-9  # CLS
    assert error(backbone.fuse(image, text, task="vqa").states, expected) < 1e-9


def test_projections_are_what_their_names_say() -> None:
    backbone, _, tensors = golden_model()
    for i, layer in enumerate(backbone.stack("encoder")):
        pairs = {**layer["attention"].projections, **layer["ffn"].projections}
        assert set(pairs) == {"q", "k", "v", "o", "in", "out"}
        for role, pair in pairs.items():
            letter = {"in": "1", "out": "2"}.get(role, role)
            for short, single in (("v", pair.image), ("t", pair.text)):
                weight = single.linear.weight if single.rows is None else single.linear.weight[single.rows]
                assert torch.equal(weight, tensors[f"b{i}.{short}.w{letter}"]), (role, short)


def test_the_contrastive_loss_equals_the_original_in_both_directions() -> None:
    tensors = golden("g5_loss")
    logits = tensors["log_scale"].exp() * tensors["feat_v"] @ tensors["feat_t"].T
    own = torch.eye(len(logits), dtype=torch.bool)
    assert error(contrastive_loss(logits, own), tensors["loss_both"]) < 1e-9
    by_image = -logits.log_softmax(1).diagonal().mean()
    assert error(by_image, tensors["loss_image_to_text"]) < 1e-9
    by_text = 2 * contrastive_loss(logits, own) - by_image
    assert error(by_text, tensors["loss_text_to_image"]) < 1e-9


def test_positions_are_interpolated_as_in_the_original() -> None:
    tensors = golden("g8_pos_interp")
    ours = resized_positions(tensors["pos_v_src"], len(tensors["pos_v_dst"]))
    assert error(ours, tensors["pos_v_dst"]) < 1e-6  # both in float32
    assert torch.equal(ours[:3], tensors["pos_v_src"][:3])
    assert resized_positions(tensors["pos_v_src"], 7) is tensors["pos_v_src"]


def test_initial_values_are_distributed_as_the_originals() -> None:
    """At the base model's width, which sets the token table's; largest values where the distribution has bounds."""
    torch.manual_seed(0)
    options = {"weights": "none", "layers": 1, "ffn": 96, "vocabulary": 1000, "tokenizer": "tiny/tokenizer.json"}
    backbone = BEiT3(BEiT3.Config(**options))
    stats = golden_json("g11_init_stats")
    attention = backbone.stack("encoder").layers[0]["attention"]
    tensors = {
        "backbone_wq": attention.projections["q"].image.linear.weight[:768],
        "head_v": backbone.own_heads["retrieval"].image.weight,
        "tok_emb": backbone.text_embedding.tokens.weight,
        "pos_v": backbone.image_embedding.positions.weight,
        "patch_w": backbone.image_embedding.patches.weight,
        "cls": backbone.image_embedding.cls,
    }
    for name, values in tensors.items():
        expected, values = stats[name], values.detach()
        assert float(values.std()) == pytest.approx(expected["std"], rel=0.01), name
        assert abs(float(values.mean())) < max(1e-4, 0.01 * expected["std"]), name
        if name in ("backbone_wq", "head_v", "patch_w", "cls"):
            assert float(values.max()) == pytest.approx(expected["max"], rel=1e-3), name
    assert not backbone.image_embedding.mask_token.any()
    assert all(not m.bias.any() for m in backbone.stacks.modules() if isinstance(m, nn.Linear | nn.LayerNorm))
    assert backbone.own_heads["retrieval"].log_scale.item() == pytest.approx(stats["log_scale"], rel=1e-6)


# ---- sizes and sites


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("base-224", 222_167_041), ("base-384", 222_458_881), ("large-224", 674_799_617), ("large-384", 675_188_737)],
)
def test_published_sizes_have_the_published_parameters(size: str, parameters: int) -> None:
    with torch.device("meta"):
        backbone = BEiT3(BEiT3.configured(f"beit3:{size}", {}))
    backbone.unfreeze()
    assert count(backbone, backbone.own_heads["retrieval"], backbone.host_parameters()).trainable == parameters
    tables = backbone.image_embedding.positions, backbone.text_embedding.positions
    assert tables[1].weight.shape == (1024, backbone.width)
    assert tables[0].weight.shape == ((int(size[-3:]) // 16) ** 2 + 3, backbone.width)


def test_drop_path_rises_from_the_first_layer_to_the_last() -> None:
    stack = multiway_stack(width=8, layers=3, heads=2, ffn=12, drop_path=0.2)
    rates = [[getattr(sublayer.drop, "drop_prob", 0.0) for _, sublayer in layer.items()] for layer in stack]
    assert rates == [[0.0, 0.0], [0.1, 0.1], [0.2, 0.2]]


@pytest.mark.parametrize("kind", [TEXT, IMAGE])
@pytest.mark.parametrize("training", [False, True])
def test_a_pass_over_one_modality_is_timms_own_block(kind: int, training: bool) -> None:
    """Bit for bit, in training with drop-path drawn alike; the other modality's block does not matter."""
    options = {"qkv_bias": True, "scale_attn_norm": True, "scale_mlp_norm": True, "norm_layer": nn.LayerNorm}
    blocks = [randomise(Block(16, 4, drop_path=0.5, **options), seed) for seed in range(2)]
    layer = multiway_layer(text=blocks[TEXT], image=blocks[IMAGE], width=16, heads=4)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2] = False  # padding mid-sequence
    context, x = Pass(segments=((kind, 5),), bias=additive(mask, torch.float64)), draw(2, 5, 16)
    library = blocks[kind].train(training)
    layer.train(training)
    torch.manual_seed(5)
    ours, _ = layer(x, context)
    torch.manual_seed(5)
    assert torch.equal(ours, library(x, attn_mask=context.bias))
    assert not torch.equal(ours, x)


class Known(nn.Module):
    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        return self.a * value + self.b * x


@pytest.mark.parametrize("parts", [(TEXT,), (IMAGE,), (TEXT, IMAGE)])
def test_known_modules_at_every_site_equal_the_formula(parts: tuple[int, ...]) -> None:
    """With routing by hand: every token through its own block's modules, attention over all of them."""
    backbone = random_tiny()
    chosen = [a_batch(backbone)[kind] for kind in parts]
    stack = backbone.stack("encoder")
    plain = backbone.fuse(*chosen, task="rec").states
    for layer in stack:
        for _, sublayer in layer.items():
            for place in ("output", "branch", "normed"):
                sublayer.insert(place, Known(1.0, 0.0))
    assert torch.equal(backbone.fuse(*chosen, task="rec").states, plain)  # bit for bit

    values = {"output": (1.5, 0.25), "branch": (0.5, -0.5), "normed": (0.75, 0.1)}
    for layer in stack:
        for _, sublayer in layer.items():
            for place, (a, b) in values.items():
                sublayer.sites[place][0] = Known(a, b)
    ours = backbone.fuse(*chosen, task="rec").states

    def change(place: str, x: Tensor, value: Tensor) -> Tensor:
        a, b = values[place]
        return a * value + b * x

    types = torch.cat([part.types for part in chosen], dim=1).unsqueeze(-1)
    mask = torch.cat([part.mask for part in chosen], dim=1)

    def routed(pair: Routed, x: Tensor) -> Tensor:
        return torch.where(types == IMAGE, pair.image(x), pair.text(x))

    x = torch.cat([part.states for part in chosen], dim=1)
    for layer in stack:
        attention, ffn = layer["attention"], layer["ffn"]
        q, k, v = (
            t.unflatten(-1, (2, 16)).transpose(1, 2)
            for t in routed(attention.core.qkv, routed(attention.norm, x)).chunk(3, dim=-1)
        )
        scores = (q / 4) @ k.transpose(-1, -2)
        weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        h = change("output", x, routed(attention.core.proj, routed(attention.core.norm, mixed)))
        x = change("normed", x, x + change("branch", x, h))
        h = change("output", x, routed(ffn.core.module, routed(ffn.norm, x)))
        x = change("normed", x, x + change("branch", x, h))
    assert error(ours, routed(stack.final_norm, x)) < 1e-12


def test_a_low_rank_path_goes_into_each_modality_and_out_again() -> None:
    backbone = random_tiny()
    text, image = a_batch(backbone)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    plain = backbone.fuse(text, image, task="rec").states
    method = LoRA(LoRA.Config(targets=("q", "k", "v", "o", "in", "out"), train_biases=False, rank=2))
    adapted, handle = adapt(method, backbone)
    adapted.eval()
    assert error(adapted.fuse(text, image, task="rec").states, plain) < 1e-12  # the paths start at zero
    pairs = [pair for layer in backbone.stack("encoder") for _, s in layer.items() for pair in s.projections.values()]
    assert len(pairs) == 12 and all(isinstance(pair, ProjectionPair) for pair in pairs)
    paths = [p for name, p in adapted.named_parameters() if name.endswith(".path.B")]
    assert len(paths) == 24 and all(p.requires_grad for p in paths)
    for p in paths:
        nn.init.normal_(p, std=0.1)
    out = adapted.fuse(text, image, task="rec").states
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in paths)
    alone = adapted.fuse(image, task="retrieval").states
    method.merge()
    assert error(adapted.fuse(text, image, task="rec").states, out) < 1e-12
    assert error(adapted.fuse(image, task="retrieval").states, alone) < 1e-12
    assert not torch.allclose(out, plain)
    handle.restore()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_checkpointing_recomputes_the_routing() -> None:
    backbone = random_tiny().train()
    text, image = a_batch(backbone)
    gradients = []
    for backbone.stack("encoder").checkpointing in (False, True):
        torch.manual_seed(0)
        both = backbone.fuse(text, image, task="rec").states.square().sum()
        alone = backbone.fuse(text, task="retrieval").states.pow(3).sum()
        (both + alone).backward(retain_graph=True)
        gradients.append({name: p.grad for name, p in backbone.named_parameters()})
        backbone.zero_grad()
    plain, again = gradients
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain.values(), again.values(), strict=True))
    assert plain["stacks.encoder.final_norm.text.weight"].any()


def test_autocast_routes_in_half_precision() -> None:
    backbone = tiny().float()
    parts = [Tokens(*(t.float() if t.dtype == torch.float64 else t for t in (p.states, p.mask, p.types, p.positions)),
                    segments=p.segments) for p in a_batch(random_tiny())]  # fmt: skip
    exact = backbone.fuse(*parts, task="rec").states
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = backbone.fuse(*parts, task="rec").states
    assert rough.isfinite().all() and error(rough.float(), exact) < 0.05


def test_multiway_layers_refuse_a_pass_without_segments() -> None:
    stack = multiway_stack(width=8, layers=1, heads=2, ffn=12, drop_path=0.0)
    with pytest.raises(ValueError, match="segments"):
        stack.run(torch.zeros(1, 3, 8), Pass())


# ---- what goes in and comes out


def test_images_are_squeezed_into_a_square() -> None:
    """Colours from -1 to 1, and places in units of the side, whatever the aspect."""
    backbone = tiny()
    stored = Image.new("RGB", (40, 10), (255, 0, 128))
    images = backbone.images([stored, Image.new("L", (32, 32), 0)])
    assert images.pixels.shape == (2, 3, 32, 32) and images.mask.all()
    assert images.pixels[0, :, 5, 5].tolist() == pytest.approx([1, -1, 128 / 127.5 - 1], abs=1e-6)
    assert images.pixels[1].unique().tolist() == [-1]
    ramp = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    expected = np.asarray(ramp.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    np.testing.assert_allclose(backbone.images([ramp]).pixels[0, 1], expected, atol=1e-6)
    boxes = torch.tensor([[20.0, 5.0, 40.0, 10.0], [8.0, 16.0, 4.0, 8.0]])
    placed = images.place(boxes)
    assert placed.flatten().tolist() == pytest.approx([0.5, 0.5, 1, 1, 0.25, 0.5, 0.125, 0.25])
    torch.testing.assert_close(images.unplace(placed), boxes)


def test_tokens_know_their_type_their_place_and_who_stands_for_all() -> None:
    backbone = random_tiny()
    text, image = a_batch(backbone)
    assert image.states.shape == (2, 17, 32) and image.mask.all() and text.mask.sum() < text.mask.numel()
    assert not text.states[~text.mask].any()
    assert image.positions[0, 0].tolist() == [0.5, 0.5]
    assert image.positions[0, 1].tolist() == [0.125, 0.125] and image.positions[0, 2].tolist() == [0.375, 0.125]
    length = text.mask.shape[1]
    fused = backbone.fuse(text, image, task="rec")
    assert fused.segments == ((TEXT, length), (IMAGE, 17)) and fused.mark.tolist() == [length] * 2
    assert torch.equal(fused.types, torch.tensor([TEXT] * length + [IMAGE] * 17).expand(2, -1))
    assert backbone.fuse(image, task="captioning").mark.tolist() == [0, 0]
    assert backbone.fuse(text, task="retrieval").mark.tolist() == [0, 0]
    head = randomise(PointingHead(32))
    assert head(fused).isfinite().all()


def test_padding_changes_nothing() -> None:
    backbone = random_tiny()
    one = backbone.embed_text(backbone.texts(["a red circle"], 20))
    two = backbone.embed_text(backbone.texts(["a red circle", "a blue square on the left of the ring"], 20))
    image = a_batch(backbone)[1]
    alone = backbone.fuse(one, Tokens(**{**vars(image), **{k: getattr(image, k)[:1] for k in ("states", "mask", "types",
                          "positions", "mark")}}), task="rec")  # fmt: skip
    beside = backbone.fuse(two, image, task="rec")
    real = beside.mask[0]
    assert error(beside.states[0][real], alone.states[0]) < 1e-12


@pytest.mark.parametrize("heads", ["trained", "frozen"])
def test_heads_train_as_configured(heads: str) -> None:
    assert tiny(heads=heads).trains_heads == (heads == "trained")


# ---- the recipe


@pytest.mark.parametrize(("warm", "name"), [(20, "lr"), (7, "lr_warmup_steps7")])
def test_the_originals_schedule_is_a_recipe(warm: int, name: str) -> None:
    tensors = golden("g7_schedule")
    peak, steps = float(tensors["lr_peak"]), len(tensors[name])
    floor = float(tensors["lr_min"]) / peak
    options = {"warmup": warm / steps, "warmup_from_zero": True, "schedule": "cosine", "lr_floor": floor}
    ours = torch.tensor([peak * rate(Recipe(steps=steps, **options), i) for i in range(steps)], dtype=torch.float64)
    assert float((ours / peak - tensors[name] / peak).abs().max()) < 1e-9


def test_the_originals_parameter_groups_are_a_recipe() -> None:
    golden = golden_json("g7_param_groups")
    backbone, names = tiny(), names_of_model()
    backbone.unfreeze()
    parameters = {f"backbone.{name}": p for name, p in backbone.named_parameters()}
    recipe = Recipe(layer_decay=golden["layer_decay"], weight_decay=golden["weight_decay"])
    groups = optimizer(parameters, recipe, 1.0, backbone).param_groups
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    ours = {theirs: found[id(p)] for name, p in backbone.named_parameters() for theirs in names[name]}
    expected = {one["param"]: (one["lr_scale"], one["weight_decay"]) for one in golden["parameters"]}
    assert all("nke_" in name or "ae_" in name for name in set(expected) - set(ours))  # the adapter's own
    for name, values in ours.items():
        assert values == pytest.approx(expected[name], abs=1e-12), name
