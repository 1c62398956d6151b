"""Modules of VL-Adapter, LoRA, Compacter, Hyperformer and prompts, alone and in single BART layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from petlbench.methods.compacter import PHMBottleneck
from petlbench.methods.hyperformer import GeneratedAdapter, HyperNetwork
from petlbench.methods.lora import LoRA
from petlbench.methods.per_task import PerTask
from petlbench.methods.prompt import PromptTokens
from petlbench.methods.vl_adapter import Adapter, VLAdapter
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer

from petlbench.api.method import make_method
from petlbench.api.sites import Layer, Pass, Projection, Stack, SubLayer
from petlbench.backbones.parts.masks import additive, causal
from petlbench.backbones.parts.transformers_parts import bart_decoder_layer, bart_encoder_layer
from tests.backbone_factory import Bare, bart_config
from tests.golden.arrays import Arrays, Difference, difference
from tests.golden.checks.pet_names import (
    PLACES,
    TASKS,
    adapter_names,
    hyper_names,
    lora_names,
    prompt_names,
    reduction_to,
)
from tests.golden.checks.vl_pet_models import fill, parts_of, sublayer_names

Named = dict[str, Tensor]


def check(arrays: Arrays) -> Iterator[Difference]:
    """Compare everything in the file that is neither an input nor a parameter."""
    if arrays.meta.get("act", "gelu_tanh") != "gelu_tanh":
        raise ValueError(f"no adapter has the activation {arrays.meta['act']}")
    layer = any(name.endswith(".q.W") for name in arrays)
    kind = arrays.name.partition("_")[0]
    with torch.no_grad():
        ours = layer_values(arrays) if layer else KINDS[kind](arrays)
    for name, theirs in arrays.items():
        if not name.startswith(("in/", "p/")):
            yield difference(name, ours.get(name), theirs)


def tasks_of(arrays: Arrays) -> list[str]:
    return [name.removeprefix("out/") for name in arrays if name.removeprefix("out/") in TASKS]


def for_tasks(module: Callable[[], Tensor], arrays: Arrays) -> Named:
    """Return the module's output in a pass of each of the file's tasks."""
    found = {}
    for task in tasks_of(arrays):
        with Pass(task=task).active():
            found[f"out/{task}"] = module()
    return found


def side_of(arrays: Arrays, side: str, prefix: str = "") -> Callable[[Callable[[], nn.Module]], nn.Module]:
    """Return a maker of projections: one for all tasks, or one for each task of the file."""
    ends, start = (f"{side}.W", f"{side}.b", f"{side}.A"), f"p/{prefix}"
    named = [name.removeprefix(start) for name in arrays if name.startswith(start) and name.endswith(ends)]
    tasks = list(dict.fromkeys(name.split(".")[0] for name in named if name.count(".") == 2))
    return lambda make: PerTask(make, tasks) if len(tasks) > 1 else make()


def bottleneck(arrays: Arrays) -> Named:
    """Run VL-Adapter's bottleneck."""
    h, rank = arrays["in/h"], int(arrays.meta["r"])
    width = h.shape[-1]
    down = side_of(arrays, "down")(lambda: nn.Linear(width, rank))
    adapter = Adapter(down, side_of(arrays, "up")(lambda: nn.Linear(rank, width))).double()
    fill(parts_of(adapter_names(adapter)), arrays.under("p/"))
    return for_tasks(lambda: adapter(torch.zeros_like(h), h), arrays)  # the adapter ignores the residual input


def low_rank(arrays: Arrays) -> Named:
    """Run a projection with LoRA's path beside it, where the method inserts it."""
    weight, x = arrays["p/W"], arrays["in/x"]
    stored = {_lora_name(name): value for name, value in arrays.under("p/").items()}
    core = nn.ModuleDict({"q": nn.Linear(weight.shape[1], len(weight))})
    sublayer = SubLayer(
        core,
        nn.Identity(),
        nn.Identity(),
        width=weight.shape[1],
        pre_norm=True,
        projections={"q": Projection(core, "q")},
    )
    backbone = Bare(encoder=Stack([Layer(attention=sublayer)], width=weight.shape[1]))
    tasks = tuple(name.partition(".")[2] for name in stored if name.startswith("A."))
    meta = arrays.meta
    options = {
        "rank": int(meta["r"]),
        "alpha": float(meta["alpha"]),
        "dropout": float(meta["dropout"]),
        "sharing": "multiple" if tasks else "single",
    }
    make_method(LoRA, options, tasks).adapt(backbone)
    backbone.double().eval()
    parallel = core["q"]
    names = {"W": parallel.base.weight, "b": parallel.base.bias} | lora_names(parallel.path)  # type: ignore[arg-type, union-attr]
    fill(parts_of(names), stored)
    return for_tasks(lambda: parallel(x), arrays)


def _lora_name(name: str) -> str:
    """Return `A` or `A.<task>`, whatever the order of the two in the name."""
    words = name.replace("lora_", "").split(".")
    matrix = next((word for word in words if word in ("A", "B")), "")
    return ".".join([matrix, *(word for word in words if word != matrix)]) if matrix else name


def kronecker(arrays: Arrays) -> Named:
    """Run Compacter's bottleneck, without the residual."""
    h, stored = arrays["in/h"], arrays.under("p/")
    rules = [name for name in stored if name.rpartition(".")[2] == "A"]
    left = stored.get("down.S_left")
    n = len(stored[rules[0]])
    shared = nn.Parameter(torch.empty(n, n, n)) if len(rules) == 1 else None
    rank = None if left is None else left.shape[-1]
    module = PHMBottleneck(h.shape[-1], int(arrays.meta["r"]), n, factor_rank=rank, rule=shared).double()
    names = adapter_names(Adapter(module.down, module.up))
    if shared is not None:
        names = {key: p for key, p in names.items() if not key.endswith(".A")} | {rules[0]: module.down.A}
    fill(parts_of(names), stored)
    adapter = Adapter(module.down, module.up)
    return {"out/delta": module(h)} | for_tasks(lambda: adapter(torch.zeros_like(h), h), arrays)


def generated(arrays: Arrays) -> Named:
    """Run Hyperformer's adapters of one layer for one task, and return their weights too."""
    stored, h, meta = arrays.under("p/"), arrays["in/h"], arrays.meta
    tasks = {name.removeprefix("task_emb."): value for name, value in stored.items() if name.startswith("task_emb.")}
    places = [name.split(".")[1] for name in stored if name.endswith(".down.gen_W.W")]
    network = HyperNetwork(
        nn.ParameterDict({task: nn.Parameter(value.clone()) for task, value in tasks.items()}),
        layers=len(stored["hyper.layer_emb"]),
        places=places,
        width=h.shape[-1],
        rank=len(stored[f"hyper.{places[0]}.down.gen_b.b"]),
        hidden=len(stored["hyper.mlp1.b"]),
        projected=len(stored["hyper.mlp2.b"]),
    ).double()
    adapters = {place: GeneratedAdapter(network, int(meta["layer"]), place) for place in places}
    names = hyper_names(list(adapters.items()), "hyper.")
    fill(parts_of({**names, **{f"task_emb.{task}": p for task, p in network.tasks.items()}}), stored)
    found = {}
    with Pass(task=meta["task"]).active():
        for place, adapter in adapters.items():
            found[f"out/{place}"] = adapter(torch.zeros_like(h), h)
            for side, (weight, bias) in zip(("down", "up"), network(meta["task"], adapter.layer, place), strict=True):
                found |= {f"mid/{place}.W_{side}": weight, f"mid/{place}.b_{side}": bias}
    return found


def prompt(arrays: Arrays) -> Named:
    stored, tokens = arrays.under("p/"), arrays["out/tokens"]
    module = PromptTokens(*stored["emb"].shape, mid=len(stored["in.b"])).double()
    fill(parts_of(prompt_names(module)), stored)
    return {"out/tokens": module().expand(len(tokens), -1, -1)}


def layer_values(arrays: Arrays) -> Named:
    """Run a BART layer with VL-Adapter's adapters, where the method inserts them."""
    meta, decoder = arrays.meta, any(name.startswith("p/cross.") for name in arrays)
    places = PLACES["decoder" if decoder else "encoder"]
    width, heads, first = int(meta["d"]), int(meta["heads_attn"]), next(iter(places.values()))
    config = bart_config(width, heads, ffn=len(arrays["p/ffn.in.W"]))
    layer = bart_decoder_layer(BartDecoderLayer(config, 0)) if decoder else bart_encoder_layer(BartEncoderLayer(config))
    backbone = Bare(encoder=Stack([layer], width=width))
    sides = [isinstance(side_of(arrays, s, f"adapter_{first}.")(nn.Identity), PerTask) for s in ("down", "up")]
    sharing = {(False, False): "single", (True, True): "multiple", (True, False): "half_shared_up"}
    options = {
        "reduction": reduction_to(int(meta["r"]), width),
        "sharing": sharing.get((sides[0], sides[1]), "half_shared_down"),
    }
    make_method(VLAdapter, options, TASKS).adapt(backbone)
    backbone.double().eval()
    names = {}
    for ours, theirs in places.items():
        (adapter,) = layer[ours].sites["output"].children()
        assert isinstance(adapter, Adapter)
        names |= sublayer_names(layer[ours], theirs) | adapter_names(adapter, f"adapter_{theirs}.")
    fill(parts_of(names), arrays.under("p/"))
    return {"out/y": _run(backbone.stack("encoder"), arrays, decoder)}


def _run(stack: Stack, arrays: Arrays, decoder: bool) -> Tensor:
    task = arrays.meta.get("task", TASKS[0])
    hidden = additive(arrays["in/memory_mask" if decoder else "in/mask"].bool(), torch.float64)
    if not decoder:
        return stack.run(arrays["in/x"], Pass(task=task, bias=hidden))[0]
    y = arrays["in/y"]
    bias = causal(y[..., 0], 0, y.dtype)
    return stack.run(y, Pass(task=task, bias=bias, memory=arrays["in/memory"], memory_bias=hidden))[0]


KINDS: dict[str, Callable[[Arrays], Named]] = {
    "vladapter": bottleneck,
    "lora": low_rank,
    "compacter": kronecker,
    "hyperformer": generated,
    "prompt": prompt,
}
