"""BEiT-3's first values and parameter groups against the original; its sites, inputs and sizes.

`test_golden.py` checks that blocks, model, loss, schedule and tables equal the original's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from petlbench.methods.lora import LoRA
from petlbench.tasks.rec import PointingHead
from PIL import Image
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from petlbench.api.method import adapt
from petlbench.api.sites import IMAGE, TEXT, Pass, ProjectionPair
from petlbench.api.tokens import Images, Tokens
from petlbench.backbones.beit3 import BEiT3
from petlbench.backbones.beit3_weights import resized_positions
from petlbench.backbones.parts.masks import additive
from petlbench.backbones.parts.multiway import Routed, multiway_layer, multiway_stack
from petlbench.core.recipe import Recipe
from petlbench.measure.parameters import count
from petlbench.training.optimizers import optimizer
from tests.backbone_factory import draw, randomise
from tests.beit3_factory import GOLDEN, error, golden_json, random_tiny, tiny
from tests.golden.arrays import Arrays
from tests.golden.checks.multiway import inputs_of, model_of, names_of_model


def a_batch(backbone: BEiT3) -> tuple[Tokens, Tokens]:
    """Return a text with padding, and an image."""
    texts = backbone.texts(["a red circle", "a blue square on the left of the ring"], 20)
    images = Images(draw(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool), *torch.ones(2, 2, 2).double())
    return backbone.embed_text(texts), backbone.embed_image(images)


# ---- the original's model


def golden_model() -> tuple[BEiT3, Arrays]:
    arrays = Arrays(GOLDEN / "g4_model_plain.npz")
    return model_of(arrays)[0], arrays


def test_a_fused_pass_equals_the_original_in_our_order() -> None:
    backbone, tensors = golden_model()
    image, text = inputs_of(backbone, tensors)
    expected = tensors["enc_fused"]
    fused = backbone.fuse(text, image, task="vqa")
    assert error(fused.states, torch.cat([expected[:, 5:], expected[:, :5]], dim=1)) < 1e-9
    assert error(fused.pooled(), expected[:, 0]) < 1e-9  # CLS
    assert error(backbone.fuse(image, text, task="vqa").states, expected) < 1e-9


def test_projections_match_their_names() -> None:
    backbone, tensors = golden_model()
    for i, layer in enumerate(backbone.stack("encoder")):
        pairs = {**layer["attention"].projections, **layer["ffn"].projections}
        assert set(pairs) == {"q", "k", "v", "o", "in", "out"}
        for role, pair in pairs.items():
            letter = {"in": "1", "out": "2"}.get(role, role)
            for short, single in (("v", pair.image), ("t", pair.text)):
                weight = single.linear.weight if single.rows is None else single.linear.weight[single.rows]
                assert torch.equal(weight, tensors[f"b{i}.{short}.w{letter}"]), (role, short)


def test_a_position_table_of_the_right_size_is_left_alone() -> None:
    table = draw(7, 12)
    assert resized_positions(table, 7) is table


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
    """Compare bit for bit, in training with the same drop-path values; the other modality's block has no effect."""
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
    """Route by hand: every token passes through its own block's modules, and attention covers all tokens."""
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


# ---- inputs and outputs


def test_images_are_squeezed_into_a_square() -> None:
    """Colours lie in -1 to 1, and places are in units of the side, for any aspect."""
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


def test_tokens_have_a_type_a_position_and_a_mark() -> None:
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


def test_a_recipe_gives_the_originals_parameter_groups() -> None:
    golden = golden_json("g7_param_groups")
    backbone, names = tiny(), names_of_model({}, golden["layers"])
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
