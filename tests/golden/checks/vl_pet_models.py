"""Whole small models of the VL-PET family, their training, and the visual block that they share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from petlbench.methods.vl_pet import VLPET, GranularityControl, VLPETConfig
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from petlbench.api.backbone import Backbone
from petlbench.api.decoding import generate, token_losses
from petlbench.api.method import Method
from petlbench.api.sites import IMAGE, Parallel, SubLayer
from petlbench.api.tokens import Images, Texts, Tokens, plain_tokens
from petlbench.backbones.parts import visual_block
from petlbench.backbones.parts.visual_block import VisualBlock, pooled
from petlbench.backbones.vl_bart import VLBart
from petlbench.backbones.vl_t5 import VLT5
from petlbench.core.recipe import Recipe
from petlbench.training.optimizers import optimizer, rate
from tests.golden import FOLDER
from tests.golden.arrays import Arrays, Difference, difference
from tests.golden.checks.pet_names import ADAPTED, Adapted

Host = VLBart | VLT5
KINDS: dict[str, Any] = {"bart": VLBart, "t5": VLT5}
PARTS = {
    "enc": {"attention": "attn", "ffn": "ffn"},
    "dec": {"attention": "self", "cross_attention": "cross", "ffn": "ffn"},
}
VARIANTS = ("small", "middleX", "middleY", "large")


@dataclass(frozen=True)
class Part:
    """The parameter of a golden name, or some of its rows."""

    parameter: nn.Parameter
    rows: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the same rows of a tensor: the parameter, or its gradient."""
        return tensor if self.rows is None else tensor[self.rows]


Parts = dict[str, Part]


@contextmanager
def double_norm() -> Iterator[None]:
    """Let T5's norm compute in the input's precision, as for the authors' numbers; the library's uses float32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        normed: Tensor = self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return normed

    with patch.object(T5LayerNorm, "forward", forward):
        yield


class Given(nn.Module):
    """Stands for the CNN: returns `grid` x `grid` cells of `channels`, which the images carry."""

    note = ""

    def __init__(self, channels: int, grid: int, *args: Any, **options: Any) -> None:
        super().__init__()
        self.channels, self.grid = channels, grid

    def forward(self, images: Images) -> Tensor:
        assert images.features is not None
        return images.features


class Ids:
    """Stands for a codec; it has only the special ids."""

    def __init__(self, pad_id: int, start_id: int, eos_id: int) -> None:
        self.pad_id, self.start_id, self.eos_id = pad_id, start_id, eos_id


def given(features: Tensor) -> Images:
    """Return images that carry the given features to the stand-in."""
    batch = len(features)
    nothing = torch.ones(batch, 0, 0, dtype=torch.bool)
    return Images(features.new_zeros(batch, 3, 0, 0), nothing, torch.ones(batch, 2), torch.zeros(batch, 2), features)


# Our parameters, by the names in the files.


def norm_names(norm: nn.Module, name: str) -> dict[str, nn.Parameter]:
    ours = {"gain": "weight", "bias": "bias"}
    return {f"{name}.{key}": getattr(norm, attr) for key, attr in ours.items() if getattr(norm, attr, None) is not None}


def linear_names(linear: nn.Linear, name: str) -> dict[str, nn.Parameter]:
    found = {f"{name}.W": linear.weight}
    return found if linear.bias is None else {**found, f"{name}.b": linear.bias}


def sublayer_names(sublayer: SubLayer, name: str) -> dict[str, nn.Parameter]:
    """Return a sub-layer's frozen parameters: the norm, and the projections beneath any paths."""
    found = norm_names(sublayer.norm, f"{name}_ln")
    for role, projection in sublayer.projections.items():
        for single in projection.singles():
            found |= linear_names(single.linear, f"{name}.{role}")
    return found


def block_names(block: VisualBlock) -> dict[str, nn.Parameter]:
    found = {"vis.img_emb": block.image.weight}
    for ours, theirs in (("feature", "feat"), ("box", "box")):
        found |= linear_names(getattr(block, ours), f"vis.{theirs}")
        found |= norm_names(getattr(block, f"{ours}_norm"), f"vis.{theirs}_ln")
    return found


def host_names(host: Host) -> dict[str, nn.Parameter]:
    found = {"tok_emb": host.token_embedding.weight} | block_names(host.visual)
    for role, short in (("encoder", "enc"), ("decoder", "dec")):
        stack = host.stack(role)
        if isinstance(host, VLBart):
            found[f"{short}.pos_emb"] = getattr(host, f"{role}_positions").weight
        else:
            first: Any = next(iter(stack))["attention"].core
            found[f"{short}.rel_bias"] = first.attention.relative_attention_bias.weight
        for norm, name in ((stack.embedding_norm, "emb_ln"), (stack.final_norm, "final_ln")):
            found |= {} if norm is None else norm_names(norm, f"{short}.{name}")
        for index, layer in enumerate(stack):
            for ours, theirs in PARTS[short].items():
                found |= sublayer_names(layer[ours], f"{short}.{index}.{theirs}")
    return found


def parts_of(names: dict[str, Any]) -> Parts:
    return {name: item if isinstance(item, Part) else Part(item) for name, item in names.items()}


def control_names(sublayer: SubLayer, name: str, heads: int) -> Parts:
    """Return the parts of VL-PET's encoder module; head i of the down projection is some rows of ours."""
    (control,) = sublayer.sites["output"].children()
    assert isinstance(control, GranularityControl)
    found: Parts = parts_of(linear_names(control.change.up, f"{name}.up"))  # type: ignore[arg-type]
    size = control.change.down.out_features // heads  # type: ignore[union-attr, operator]
    for head in range(heads):
        down = linear_names(control.change.down, f"{name}.down{head}")  # type: ignore[arg-type]
        found |= {key: Part(p, slice(head * size, (head + 1) * size)) for key, p in down.items()}
    gate: Any = control.gate
    if hasattr(gate, "z"):
        return found | {f"{name}.gate_vec": Part(gate.z)}
    if hasattr(gate, "linear"):
        return found | parts_of(linear_names(gate.linear, f"{name}.gate"))
    sides = {"gate_down": gate.bottleneck.down, "gate_up": gate.bottleneck.up}
    return found | {k: v for side, m in sides.items() for k, v in parts_of(linear_names(m, f"{name}.{side}")).items()}


def value_names(sublayer: SubLayer, name: str) -> Parts:
    """Return the parts of VL-PET's value adapter in a sub-layer."""
    (value,) = sublayer.projections["v"].singles()
    beside: Any = getattr(value.owner, value.name)
    assert isinstance(beside, Parallel)
    path: Any = beside.path
    return parts_of(linear_names(path.down, f"{name}.down") | linear_names(path.up, f"{name}.up"))


def _build(variant: str, meta: dict[str, Any], family: str) -> Method:
    sizes = meta["hyper"]
    config = VLPETConfig(
        variant=variant,  # type: ignore[arg-type]
        rank=sizes["adapter_down_dim"],
        gate_rank=sizes["adapter_gating_down_dim"],
        value_rank=sizes["decoder_enc_attn_value_parallel_adapter_down_dim"],
        heads=sizes["encoder_adapter_multihead_num_head"],
        scale=sizes["encoder_gating_scaling_factor"] if sizes["use_encoder_gating_scaling"] else 1.0,
        mask_gate=False,
    )
    return VLPET(config)


def _names(backbone: Backbone, meta: dict[str, Any]) -> Parts:
    heads, found = meta["hyper"]["encoder_adapter_multihead_num_head"], {}
    for index, layer in enumerate(backbone.stack("encoder")):
        for ours, theirs in PARTS["enc"].items():
            found |= control_names(layer[ours], f"enc.{index}.pet_{theirs}", heads)
    for index, layer in enumerate(backbone.stack("decoder")):
        found |= value_names(layer["cross_attention"], f"dec.{index}.value_adapter")
    return found


METHODS = {**ADAPTED, **{f"vlpet_{name}": Adapted(partial(_build, name), _names) for name in VARIANTS}}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Model:
    """An adapted host with the file's values, and the passes that the file needs."""

    host: Host
    backbone: Backbone
    parts: Parts
    arrays: Arrays

    def target(self) -> Texts:
        labels = self.arrays["in/labels"]
        return Texts(labels.masked_fill(labels < 0, self.backbone.pad_id), labels >= 0)

    def memory(self, task: str) -> Tokens:
        """Run the joint pass over the batch for `task`; NLVR2 has two images per sample."""
        ids = self.arrays["in/input_ids"]
        text = self.backbone.embed_text(Texts(ids, ids != self.backbone.pad_id), task=task)
        return self.backbone.fuse(text, self._image(task), task=task)

    def _image(self, task: str) -> Tokens:
        features, boxes, several = self.arrays["in/vis_feats"], self.arrays["in/boxes"], task == "nlvr"
        if not several and not boxes.any():
            return self.backbone.embed_image(given(features), task=task)
        grids = self.arrays["in/nlvr_vis_feats"] if several else features.unsqueeze(1)
        states = self.host.visual(grids, self.host.token_embedding.weight, boxes.unsqueeze(1))
        return plain_tokens(states, torch.ones(states.shape[:2], dtype=torch.bool), IMAGE)

    def logits(self, memory: Tokens, ids: Tensor, task: str) -> Tensor:
        """Return the logits (B, T, V) of each token given the tokens before it."""
        start = torch.full_like(ids[:, :1], self.backbone.start_id)
        return self.backbone.decode(memory, torch.cat([start, ids[:, :-1]], dim=1), task=task)[0]

    def loss(self, task: str) -> Tensor:
        """Return the authors' loss: VQA's is weighted by the answers' scores, captions' is a mean over all tokens."""
        target, memory = self.target(), self.memory(task)
        losses = token_losses(self.backbone, memory, target, task)
        means = losses.sum(1) / target.mask.sum(1)
        if task == "caption":
            return losses.sum() / target.mask.sum()
        return (self.arrays["in/answer_scores"] * means).mean() if task == "vqa" else means.mean()


def _sizes(base: dict[str, Any], family: str) -> dict[str, Any]:
    if family == "bart":
        return {
            "encoder_layers": base["encoder_layers"],
            "decoder_layers": base["decoder_layers"],
            "heads": base["encoder_attention_heads"],
            "ffn": base["encoder_ffn_dim"],
            "max_positions": base["max_position_embeddings"],
        }
    return {
        "encoder_layers": base["num_layers"],
        "decoder_layers": base.get("num_decoder_layers", base["num_layers"]),
        "heads": base["num_heads"],
        "head_width": base["d_kv"],
        "ffn": base["d_ff"],
        "buckets": base["relative_attention_num_buckets"],
        "max_distance": base.get("relative_attention_max_distance", 128),
    }


def host_of(arrays: Arrays) -> Host:
    """Build the family at the file's sizes, in evaluation mode and double precision, with random values."""
    meta = arrays.meta
    base, family = meta["base"], meta["backbone"]
    sizes = {"width": base["d_model"], "vocabulary": base["vocab_size"], "added_rows": 0, **_sizes(base, family)}
    sizes["cells"] = math.isqrt(meta["n_visual_tokens"])
    stand_in = partial(Given, meta["feat_dim"], math.isqrt(arrays["in/vis_feats"].shape[1]))
    cls = KINDS[family]
    with patch.object(visual_block, "GridFeatures", stand_in):
        host: Host = cls(cls.configured(f"vl_{family}:tiny", sizes))
    host.codec = Ids(meta["pad_id"], meta["decoder_start_id"], meta["eos_id"])  # type: ignore[assignment]
    return host.double().eval()


def fill(parts: Parts, stored: dict[str, Tensor]) -> None:
    """Fill every parameter from the file. Raises ValueError if one is missing, left over or of another shape."""
    if parts.keys() != stored.keys():
        raise ValueError(f"parameters that only one side has: {', '.join(sorted(parts.keys() ^ stored.keys())[:6])}")
    for name, part in parts.items():
        rows = part.of(part.parameter.data)
        if rows.shape != stored[name].shape:
            raise ValueError(f"{name} is {list(stored[name].shape)} in the file and {list(rows.shape)} here")
        rows.copy_(stored[name])


def model_of(arrays: Arrays) -> Model:
    """Build the model of a file. Raises ValueError if no check has the file's method."""
    family = arrays.meta["backbone"]
    wanted = arrays.name.removeprefix(f"tiny_{family}_")
    found = [name for name in METHODS if wanted.startswith(name)]
    if not found:
        raise ValueError(f"no method is called {wanted}: there are {', '.join(METHODS)}")
    adapted = METHODS[max(found, key=len)]
    meta = {**arrays.meta, "shapes": {name: tuple(value.shape) for name, value in arrays.under("p/").items()}}
    host = host_of(arrays)
    parts = parts_of(host_names(host))
    backbone = adapted.build(meta, family).adapt(host).double().eval()
    parts |= parts_of(adapted.names(backbone, meta))
    nameless = {id(p) for p in backbone.parameters()} - {id(part.parameter) for part in parts.values()}
    if nameless:
        raise ValueError(f"{len(nameless)} of our parameters are none of the file's")
    fill(parts, arrays.under("p/"))
    return Model(host, backbone, parts, arrays)


def check_model(arrays: Arrays) -> Iterator[Difference]:
    """Compare outputs for each task, the trainable names, and the gradients of VQA's loss."""
    with double_norm():
        model = model_of(arrays)
        yield from _check_trained(model)
        with torch.no_grad():
            ours = _outputs(model)
        for name, theirs in arrays.under("out/").items():
            if name == "greedy_ids":
                yield _same("out/greedy_ids", ours[name], _until_end(model.backbone, theirs[:, 1:].tolist()))
            else:
                yield difference(f"out/{name}", ours.get(name), theirs)
        yield from _check_gradients(model)


def _same(name: str, ours: object, theirs: object) -> Difference:
    return Difference(name, 0.0 if ours == theirs else math.inf, 0.0)


def _check_trained(model: Model) -> Iterator[Difference]:
    trained = {name for name, part in model.parts.items() if part.parameter.requires_grad}
    yield _same("trainable", trained, set(model.arrays.meta["trainable"]))
    yield _same("frozen", model.parts.keys() - trained, set(model.arrays.meta["frozen"]))


def _outputs(model: Model) -> dict[str, Any]:
    """Return outputs by their names in the files."""
    backbone, arrays, target = model.backbone, model.arrays, model.target()
    memory, two = model.memory("vqa"), model.memory("nlvr")
    meta, batch = arrays.meta, len(target.ids)
    asked = [meta["decoder_start_id"], *([] if meta["bos_id"] is None else [meta["bos_id"]])]
    answer, _ = backbone.decode(two, torch.tensor([asked] * batch), task="nlvr")
    length = arrays["out/greedy_ids"].shape[1] - 1
    return {
        **{f"{task}_loss": model.loss(task) for task in ("vqa", "gqa", "caption", "nlvr")},
        "encoder_hidden": memory.states,
        "logits": model.logits(memory, target.ids, "vqa"),
        "token_loss": token_losses(backbone, memory, target, "vqa"),
        "nlvr_logits": model.logits(two, target.ids, "nlvr"),
        "nlvr_pred": answer[:, -1, meta["true_id"]] > answer[:, -1, meta["false_id"]],
        "greedy_ids": generate(backbone, memory, task="vqa", max_length=length),
    }


def _until_end(backbone: Backbone, rows: list[list[int]]) -> list[list[int]]:
    """Cut generated ids before the end token or padding, like ours."""
    stops = (backbone.eos_id, backbone.pad_id)
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def _check_gradients(model: Model) -> Iterator[Difference]:
    """Compare the gradients of all trainable parameters; those of other tasks must have none."""
    parameters = {id(p): p for p in model.backbone.parameters() if p.requires_grad}
    found = torch.autograd.grad(model.loss("vqa"), list(parameters.values()), allow_unused=True)
    gradients = dict(zip(parameters, found, strict=True))
    ours: dict[str, Tensor | None] = {}
    for name, part in model.parts.items():
        gradient = gradients.get(id(part.parameter))
        trains = part.parameter.requires_grad
        ours[name] = part.of(torch.zeros_like(part.parameter) if gradient is None else gradient) if trains else None
    for name, theirs in model.arrays.under("g/").items():
        yield difference(f"g/{name}", ours.get(name), theirs)
    for name, theirs in model.arrays.under("gn/").items():
        gradient = ours.get(name)
        yield difference(f"gn/{name}", None if gradient is None else gradient.norm(), theirs)
    for name in model.arrays.meta["trainable_without_grad_for_this_batch"]:
        gradient = ours.get(name)
        yield _same(f"no gradient: {name}", gradient is not None and not gradient.any(), True)


def check_training(arrays: Arrays) -> Iterator[Difference]:
    """Compare some steps of the authors' optimizer, clipping and schedule; they start from another file's values."""
    meta = arrays.meta
    (start,) = re.findall(r"\S+\.npz", meta["start"])
    model = model_of(Arrays(getattr(arrays, "folder", FOLDER / "vl_pet_family") / start))
    recipe = Recipe(
        steps=meta["total_steps"],
        lr=meta["lr"],
        warmup=meta["warmup"] / meta["total_steps"],
        clip_norm=meta["clip"],
        weight_decay=meta["weight_decay"],
        eps=meta["eps"],
        betas=tuple(meta["betas"]),
        released=True,
    )
    with double_norm():
        seen = list(_steps(model, recipe, meta["tasks"]))
    for name, values in zip(("loss", "grad_norm_before_clip", "lr_used"), zip(*seen, strict=True), strict=True):
        yield difference(name, torch.tensor(values, dtype=torch.float64), arrays[name])
    for name, theirs in arrays.under("after/").items():
        part = model.parts.get(name)
        yield difference(f"after/{name}", None if part is None else part.of(part.parameter.data), theirs)


def _steps(model: Model, recipe: Recipe, tasks: list[str]) -> Iterator[tuple[float, float, float]]:
    """Train as the training loop does; yield each step's loss, gradient norm before clipping, and rate."""
    backbone = model.backbone
    parameters = {f"backbone.{name}": p for name, p in backbone.named_parameters() if p.requires_grad}
    stepper = optimizer(parameters, recipe, recipe.lr, backbone)
    assert recipe.clip_norm is not None
    for step, task in enumerate(tasks):
        stepper.zero_grad(set_to_none=True)
        loss = model.loss(task)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), recipe.clip_norm)
        lr = recipe.lr * rate(recipe, step)
        for group in stepper.param_groups:
            group["lr"] = lr * group["scale"]
        stepper.step()
        yield float(loss.detach()), float(norm), lr


def check_visual_block(arrays: Arrays) -> Iterator[Difference]:
    """Compare the visual block with non-zero boxes, for one image and for two."""
    one, two = arrays["in/feats_one"], arrays["in/feats_two"]
    tokens, cells = arrays["out/one_image"].shape[1], one.shape[1]
    norm = nn.LayerNorm if "p/vis.feat_ln.bias" in arrays else T5LayerNorm
    block = VisualBlock(arrays.meta["feat_dim"], arrays.meta["d"], math.isqrt(tokens), norm).double()
    stored = arrays.under("p/")
    table = stored.pop("tok_emb")
    fill(parts_of(block_names(block)), stored)
    yield difference("mid/pooled_one_image", pooled(one, block.cells), arrays["mid/pooled_one_image"])
    with double_norm():
        ours = block(one.unsqueeze(1), table, arrays["in/boxes_one"].unsqueeze(1))
        yield difference("out/one_image", ours, arrays["out/one_image"])
        boxes = arrays["in/boxes_two"].unflatten(1, (-1, cells))
        yield difference("out/two_images", block(two.unflatten(1, (-1, cells)), table, boxes), arrays["out/two_images"])
