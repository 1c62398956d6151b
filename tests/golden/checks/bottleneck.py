"""AdaptFormer's code and the adapters library: bottlenecks beside and after sub-layers, and a whole block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from petlbench.methods.adaptformer import AdaptFormer, AdaptFormerConfig
from petlbench.methods.bottlenecks import HubLayer
from petlbench.methods.houlsby import Houlsby
from petlbench.methods.parallel import ParallelAdapter
from petlbench.methods.pfeiffer import Pfeiffer
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from petlbench.api.method import Method
from petlbench.api.sites import Layer, Pass, Stack, SubLayer
from petlbench.backbones.parts.transformers_parts import clip_layer
from tests.backbone_factory import Bare
from tests.golden.arrays import Arrays, Difference, difference

SUBLAYERS = {"attn": "attention", "ffn": "ffn"}  # the files' names to ours
ACTIVATIONS = {"swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
KINDS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "houlsby": (Houlsby, {}),
    "houlsby_gated": (Houlsby, {"gate": True, "mask_gate": False}),
    "houlsby_ln_in_out": (Houlsby, {"norm_in": True, "norm_out": True}),
    "pfeiffer": (Pfeiffer, {}),
    "pfeiffer_post_add": (Pfeiffer, {"residual": "post_add"}),
    "pfeiffer_res_after_ln": (Pfeiffer, {"residual": "after"}),
    "parallel": (ParallelAdapter, {}),
    "parallel_learned": (ParallelAdapter, {"scale": "learned"}),
    "adapterplus": (Pfeiffer, dict(Pfeiffer.variants["plus"])),
}
RESULTS = ("x", "h", "y", "delta", "with_identity")  # arrays of a file that are not parameters or gradients
FINAL_EPS = 1e-12  # epsilon of the pre-norm host's final norm

Named = dict[str, Tensor]


class Given(nn.Module):
    """A core whose output the test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.h = torch.zeros(())

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        return self.h


def check(file: Arrays) -> Iterator[Difference]:
    if file.name.startswith("adaptformer_module"):
        return check_module(file)
    if file.name.startswith("adaptformer_block"):
        return check_block(file)
    return check_host(file)


def given_layer(width: int, *, pre_norm: bool, eps: float) -> Layer:
    """Attention and ffn with given frozen cores."""
    sizes: dict[str, Any] = {"width": width, "pre_norm": pre_norm, "projections": {}}
    names = SUBLAYERS.values()
    return Layer(**{name: SubLayer(Given(), nn.LayerNorm(width, eps=eps), nn.Identity(), **sizes) for name in names})


def adapted(method: Method, layers: list[Layer], width: int) -> list[Layer]:
    """Return the layers with the method, in double precision and evaluation mode, all gradients on."""
    backbone = Bare(encoder=Stack(layers, width=width)).double().eval()
    backbone.roles = lambda: ("encoder",)  # type: ignore[method-assign]
    backbone.pretrained_roles = backbone.roles  # type: ignore[method-assign]
    method.adapt(backbone)
    backbone.eval().requires_grad_(True)
    return layers


def parameters(module: HubLayer, host: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters by the files' names."""
    down, up = module.bottleneck.down, module.bottleneck.up
    found = {"D": down.weight, "bD": down.bias, "U": up.weight, "bU": up.bias}
    if isinstance(module.scale, nn.Parameter):
        found["s"] = module.scale
    for name, norm in (("ln_in", module.norm_in), ("ln_out", module.norm_out), ("host_ln", host)):
        if isinstance(norm, nn.LayerNorm):
            found |= {f"{name}_gamma": norm.weight, f"{name}_beta": norm.bias}
    return found


def gate_parameters(module: HubLayer, stored: Named) -> dict[str, nn.Parameter]:
    """Return the gate's weight and bias by the files' names; their sizes tell which is which."""
    if module.gate is None:
        return {}
    by_size = {p.numel(): p for p in (module.gate.weight, module.gate.bias)}
    return {name: by_size[value.numel()] for name, value in stored.items() if name.startswith("gate_")}


def load(mine: dict[str, nn.Parameter], stored: Named) -> None:
    """Copy each array into its parameter. Raises ValueError if one is missing or left over."""
    if odd := mine.keys() ^ stored.keys():
        raise ValueError(f"parameters that are only in the file, or only in ours: {', '.join(sorted(odd))}")
    for name, parameter in mine.items():
        if parameter.numel() != stored[name].numel():
            raise ValueError(f"{name} is {tuple(stored[name].shape)} in the file, and {tuple(parameter.shape)} in ours")
        parameter.data.copy_(stored[name].reshape(parameter.shape))


def against(prefix: str, loss: Tensor, values: Named, stored: Named) -> Iterator[Difference]:
    """Compare every stored gradient `grad_NAME`."""
    wanted = {name.removeprefix("grad_"): value for name, value in stored.items() if name.startswith("grad_")}
    leaves = {name: values[name] for name in wanted if name in values}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = dict(zip(leaves, gradients, strict=True))
    for name, value in wanted.items():
        gradient = found.get(name)
        if gradient is not None and gradient.numel() == value.numel():
            gradient = gradient.reshape(value.shape)  # a gate's row may be stored as a vector
        yield difference(f"{prefix}grad_{name}", gradient, value)


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def learned(stored: Named) -> str | None:
    """Return the option for the scale that a file holds."""
    return ("learned" if stored["s"].numel() == 1 else "learned_vector") if "s" in stored else None


def check_module(file: Arrays) -> Iterator[Difference]:
    """Compare AdaptFormer's branch alone: beside an FFN that gives 0, it is the value at the place `branch`."""
    for variant in sorted({key.partition(".")[0] for key in file if "." in key}):
        stored = file.under(f"{variant}.")
        options: dict[str, Any] = {"norm_in": variant == "ln_in", "norm_out": variant == "ln_out"}
        scale = learned(stored) or file.meta.get("scale", 0.1)
        rank, width = stored["D"].shape
        method = AdaptFormer(AdaptFormerConfig(rank=rank, scale=scale, **options))
        (layer,) = adapted(method, [given_layer(width, pre_norm=True, eps=0.0)], width)
        sublayer, module = layer["ffn"], only(layer["ffn"])
        mine = {name.replace("ln_in", "ln").replace("ln_out", "ln"): p for name, p in parameters(module).items()}
        load(mine, {n: v for n, v in stored.items() if n not in RESULTS and not n.startswith("grad_")})
        x = leaf(file["x"])
        sublayer.core.h = torch.zeros_like(file["x"])  # type: ignore[assignment]
        y, taps = sublayer(x, Pass(), frozenset({"branch"}))
        yield difference(f"{variant}.delta", taps["branch"], stored["delta"])
        yield difference(f"{variant}.with_identity", y, stored["with_identity"])
        yield from against(f"{variant}.", (taps["branch"] * file["w_loss"]).sum(), {**mine, "x": x}, stored)


def only(sublayer: SubLayer) -> HubLayer:
    """Return the one module inserted in a sub-layer. Raises ValueError if there is not exactly one."""
    modules = [module for sites in sublayer.sites.children() for module in sites.children()]
    if len(modules) != 1 or not isinstance(modules[0], HubLayer):
        raise ValueError("not one adapter is in the sub-layer")
    return modules[0]


def check_block(file: Arrays) -> Iterator[Difference]:
    """Compare a whole vision block, from the library's layer, with the branch in both forms."""
    meta, stored = file.meta, file.under("block.")
    rank, width = stored["adapter.D.weight"].shape
    options: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": len(stored["fc1.weight"]),
        "num_attention_heads": meta["heads"],
        "hidden_act": "gelu",
        "layer_norm_eps": meta["ln_eps"],
    }
    for form in ("parallel", "sequential"):
        library = CLIPEncoderLayer(CLIPVisionConfig(**options, attn_implementation="sdpa"))
        method = AdaptFormer(AdaptFormerConfig(rank=rank, form=form, scale=float(meta["scale"])))
        (layer,) = adapted(method, [clip_layer(library)], width)
        mine = block_parameters(library, only(layer["ffn"]))
        load(mine, stored)
        x, places = leaf(file["x_in"]), frozenset({"output", "normed"})
        y, taps = layer(x, Pass(), {"attention": places, "ffn": places})
        seen = {
            "h_attn": taps["attention", "output"],
            "x_ffn": taps["attention", "normed"],
            "h_ffn": taps["ffn", "output"],
            "y": y,
        }
        for name, value in seen.items():
            yield difference(f"{form}.{name}", value, file[f"{form}.{name}"])
        values = {"x_in": x, **{f"grad.{name}": p for name, p in mine.items()}}
        gradients = {
            key.replace("grad.", "grad_grad.", 1): value
            for key, value in file.under(f"{form}.").items()
            if key.startswith("grad")
        }
        yield from against(f"{form}.", (y * file["w_loss"]).sum(), values, gradients)


def block_parameters(library: CLIPEncoderLayer, module: HubLayer) -> dict[str, nn.Parameter]:
    """Return the block's parameters by the file's names."""
    attention = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
    parts = {f"attn.{theirs}": getattr(library.self_attn, ours) for theirs, ours in attention.items()}
    parts |= {"norm1": library.layer_norm1, "norm2": library.layer_norm2}
    parts |= {"fc1": library.mlp.fc1, "fc2": library.mlp.fc2}
    parts |= {"adapter.D": module.bottleneck.down, "adapter.U": module.bottleneck.up}
    return {f"{name}.{kind}": getattr(part, kind) for name, part in parts.items() for kind in ("weight", "bias")}


def check_host(file: Arrays) -> Iterator[Difference]:
    """Compare the adapters library on a host of some layers: each position by itself, from its own x and h."""
    kind, order = named(file.name)
    cls, options = KINDS[kind]
    positions = sorted({key.rpartition(".")[0] for key in file if key.startswith("layer")})
    stored = {position: file.under(f"{position}.") for position in positions}
    rank, width = stored[positions[0]]["D"].shape
    config = cls.Config(**{**options, "rank": rank, **of_file(file.meta, stored[positions[0]])})
    eps = re.search(r"eps ([\d.e+-]+)", file.meta["host"])
    count = 1 + max(int(re.findall(r"\d+", position)[0]) for position in positions)
    layers = [given_layer(width, pre_norm=order == "preln", eps=float(eps[1]) if eps else 1e-5) for _ in range(count)]
    sublayers = {
        f"layer{index}.{theirs}": layer[ours]
        for index, layer in enumerate(adapted(cls(config), layers, width))
        for theirs, ours in SUBLAYERS.items()
        if any(len(list(sites.children())) for sites in layer[ours].sites.children())
    }
    if odd := sublayers.keys() ^ stored.keys():
        raise ValueError(f"positions that are only in the file, or only in ours: {', '.join(sorted(odd))}")
    y = file["final"]
    for position in positions:
        sublayer, values = sublayers[position], stored[position]
        module, x, h = only(sublayer), leaf(values["x"]), leaf(values["h"])
        mine = parameters(module, None if sublayer.pre_norm else sublayer.norm) | gate_parameters(module, values)
        load(mine, {n: v for n, v in values.items() if n not in RESULTS and not n.startswith("grad_")})
        sublayer.core.h = h  # type: ignore[assignment]
        y, _ = sublayer(x, Pass())
        yield difference(f"{position}.y", y, values["y"])
        yield from against(f"{position}.", (y * file["w_loss"]).sum(), {**mine, "x": x, "h": h}, values)
    yield difference("final", last_norm(y, file["final"]) if order == "preln" else y, file["final"])


def named(name: str) -> tuple[str, str]:
    """Return the adapter and the order of the host's norm from a file's name. Raises ValueError for other names."""
    found = re.match(r"bottleneck_(\w+?)_(postln|preln)", name)
    if found is None or found[1] not in KINDS:
        raise ValueError(f"no adapter has this name: there are {', '.join(KINDS)}, each _postln or _preln")
    return found[1], found[2]


def of_file(meta: dict[str, Any], stored: Named) -> dict[str, Any]:
    """Return the options that a file states."""
    found: dict[str, Any] = {"activation": ACTIVATIONS[meta["activation"]]} if "activation" in meta else {}
    scale = learned(stored) or meta.get("scaling")
    return found | ({} if scale is None else {"scale": scale})


def last_norm(y: Tensor, expected: Tensor) -> Tensor:
    """Apply the pre-norm host's final norm to y; least squares give its gain and bias, which no file holds."""
    y = y.detach()
    normed = nn.functional.layer_norm(y, y.shape[-1:], eps=FINAL_EPS).flatten(0, -2)
    columns = []
    for ours, theirs in zip(normed.T, expected.flatten(0, -2).T, strict=True):
        design = torch.stack([ours, torch.ones_like(ours)], 1)
        columns.append(design @ torch.linalg.lstsq(design, theirs[:, None]).solution[:, 0])
    return torch.stack(columns, -1).reshape(expected.shape)
