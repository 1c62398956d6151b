"""Builds each method of the VL-Adapter family for a whole golden model, and names its parameters as the model does.

Sizes come from the file: from its arrays if it gives their shapes (`meta["shapes"]`, by golden name), else from the
options of the authors' script, else from the README's sizes of all whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from petlbench.methods.compacter import Compacter, PHMLinear
from petlbench.methods.hyperformer import GeneratedAdapter, Generator, Hyperformer
from petlbench.methods.lora import LoRA, LowRank
from petlbench.methods.per_task import PerTask
from petlbench.methods.prompt import Prompt, Prompted, PromptTokens
from petlbench.methods.selective import BitFit, Full
from petlbench.methods.vl_adapter import Adapter, VLAdapter
from torch import nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, make_method
from petlbench.api.sites import Parallel, SubLayer

Meta = Mapping[str, Any]
Named = dict[str, nn.Parameter]
TASKS = ("vqa", "gqa", "nlvr", "caption")
PLACES = {
    "encoder": {"attention": "attn", "ffn": "ffn"},
    "decoder": {"attention": "self", "cross_attention": "cross", "ffn": "ffn"},
}
SHORT = {"encoder": "enc", "decoder": "dec"}


@dataclass(frozen=True)
class Adapted:
    """A file's method: `build(meta, family)` makes it, `names(adapted backbone, meta)` gives names without `p/`."""

    build: Callable[[Meta, str], Method]
    names: Callable[[Backbone, Meta], Named]


def size(meta: Meta, pattern: str, axis: int, options: tuple[str, ...], default: int) -> int:
    """Return one size: from the first array that the pattern matches, or from the first given option."""
    for name, shape in meta.get("shapes", {}).items():
        if fnmatchcase(name.removeprefix("p/"), pattern):
            return int(shape[axis])
    overrides = [str(word) for word in meta.get("overrides", [])]
    given: dict[str, Any] = dict(pairwise(overrides))
    given |= {f"--{key}": value for key, value in meta.get("hyper", {}).items()}
    return next((int(given[f"--{option}"]) for option in options if f"--{option}" in given), default)


def reduction(meta: Meta, pattern: str) -> int:
    """Return the reduction of bottlenecks; the pattern matches their down projections' biases."""
    width = int(meta["base"]["d_model"])
    rank = size(meta, pattern, 0, (), 0)
    return reduction_to(rank, width) if rank else size(meta, "", 0, ("reduction_factor",), 4)


def reduction_to(rank: int, width: int) -> int:
    """Return a reduction of the width that gives the rank. Raises ValueError if there is none."""
    found = next((reduction for reduction in range(1, width + 1) if width // reduction == rank), None)
    if found is None:
        raise ValueError(f"no reduction of a width of {width} gives a rank of {rank}")
    return found


def sublayers(backbone: Backbone) -> Iterator[tuple[str, str, SubLayer]]:
    """Yield (`enc.0.`, `attn`, sub-layer) and so on."""
    for role, places in PLACES.items():
        for index, layer in enumerate(backbone.stack(role)):
            for ours, theirs in places.items():
                yield f"{SHORT[role]}.{index}.", theirs, layer[ours]


def by_task(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (`vqa.`, module) and so on, or ("", module) if all tasks share one."""
    if isinstance(module, PerTask):
        yield from ((f"{task}.", one) for task, one in module.tasks.items())
    else:
        yield "", module


def linear_names(linear: nn.Linear, name: str) -> Named:
    return {f"{name}.W": linear.weight, f"{name}.b": linear.bias}


def projection_names(module: nn.Module, name: str) -> Named:
    """Return the parameters of a linear or a PHM layer by name."""
    if isinstance(module, nn.Linear):
        return linear_names(module, name)
    assert isinstance(module, PHMLinear)
    return {f"{name}.{key}": parameter for key, parameter in module.named_parameters(remove_duplicate=False)}


def adapter_names(adapter: Adapter, prefix: str = "") -> Named:
    """Name an adapter's parameters; beside a projection per task, a shared one has the first task's name."""
    sides = {"down": list(by_task(adapter.down)), "up": list(by_task(adapter.up))}
    tasks = max((list(side) for side in sides.values()), key=len)
    first = tasks[0][0]
    found: Named = {}
    for side, modules in sides.items():
        for task, module in modules:
            found |= projection_names(module, f"{prefix}{task or first}{side}")
    return found


def adapters(backbone: Backbone, meta: Meta) -> Named:
    found: Named = {}
    for layer, place, sublayer in sublayers(backbone):
        (adapter,) = sublayer.sites["output"].children()
        assert isinstance(adapter, Adapter)
        found |= adapter_names(adapter, f"{layer}adapter_{place}.")
    return found


def lora_names(path: nn.Module, prefix: str = "") -> Named:
    found: Named = {}
    for task, module in by_task(path):
        assert isinstance(module, LowRank)
        end = f".{task}".rstrip(".")
        found |= {f"{prefix}A{end}": module.A, f"{prefix}B{end}": module.B}
    return found


def low_ranks(backbone: Backbone, meta: Meta) -> Named:
    found: Named = {}
    for layer, place, sublayer in sublayers(backbone):
        for role, projection in sublayer.projections.items():
            for single in projection.singles():
                module = getattr(single.owner, single.name)
                if isinstance(module, Parallel):
                    found |= lora_names(module.path, f"{layer}{place}.{role}.lora_")
    return found


def hyper_names(adapters: list[tuple[str, GeneratedAdapter]], prefix: str = "") -> Named:
    """Name the parameters of one stack's network and its adapters' places, without the task embeddings."""
    network = adapters[0][1].network
    found: Named = {f"{prefix}layer_emb": network.layers}
    found |= linear_names(network.enter, f"{prefix}mlp1") | linear_names(network.leave, f"{prefix}mlp2")
    found |= {f"{prefix}ln.gain": network.norm.weight, f"{prefix}ln.bias": network.norm.bias}
    for place, adapter in adapters:
        for side in ("down", "up"):
            generator = getattr(network, side)[adapter.where]
            assert isinstance(generator, Generator)
            found |= linear_names(generator.weight, f"{prefix}{place}.{side}.gen_W")
            found |= linear_names(generator.bias, f"{prefix}{place}.{side}.gen_b")
    return found


def hyper_networks(backbone: Backbone, meta: Meta) -> Named:
    found: Named = {}
    # A decoder's self-attention is named like its other parts, or like a hyper-network's encoder.
    own = any(".hyper.self." in name for name in meta.get("trainable", ()))
    for role, places in PLACES.items():
        adapters = []
        for ours, theirs in places.items():
            (adapter,) = next(iter(backbone.stack(role)))[ours].sites["output"].children()
            assert isinstance(adapter, GeneratedAdapter)
            adapters.append((theirs if own or theirs != "self" else "attn", adapter))
        found |= hyper_names(adapters, f"{SHORT[role]}.hyper.")
        found |= {f"task_emb.{task}": value for task, value in adapters[0][1].network.tasks.items()}
    return found


def prompt_names(tokens: PromptTokens, prefix: str = "") -> Named:
    found: Named = {f"{prefix}emb": tokens.embedding}
    return found | linear_names(tokens.enter, f"{prefix}in") | linear_names(tokens.leave, f"{prefix}out")


def prompts(backbone: Backbone, meta: Meta) -> Named:
    assert isinstance(backbone, Prompted)
    found: Named = {}
    for task, tokens in by_task(backbone.prompts):
        assert isinstance(tokens, PromptTokens)
        found |= prompt_names(tokens, f"enc.prompt.{task}")
    return found


def _vl_adapter(sharing: Any) -> Adapted:
    def build(meta: Meta, family: str) -> Method:
        options = {"reduction": reduction(meta, "*.adapter_*down.b"), "sharing": sharing}
        return make_method(VLAdapter, options, TASKS)

    return Adapted(build, adapters)


def _lora(sharing: Any) -> Adapted:
    def build(meta: Meta, family: str) -> Method:
        rank = size(meta, "*.lora_A*", 0, ("lora_dim", "lora_r", "r"), 6)
        alpha = size(meta, "", 0, ("lora_alpha", "alpha"), 32)
        return make_method(LoRA, {"rank": rank, "alpha": alpha, "sharing": sharing}, TASKS)

    return Adapted(build, low_ranks)


def _compacter(meta: Meta, family: str) -> Method:
    n = size(meta, "*down.A", 0, ("hypercomplex_division",), 2)
    factor = size(meta, "*down.S_left", 2, (), 0) or None
    several = any(fnmatchcase(name, "*.adapter_attn.vqa.*") for name in meta.get("trainable", ()))
    options = {
        "reduction": reduction(meta, "*.adapter_*down.b"),
        "n": n,
        "factor_rank": factor,
        "sharing": "multiple" if several else "single",
    }
    return make_method(Compacter, options, TASKS)


def _hyperformer(meta: Meta, family: str) -> Method:
    options = {
        "reduction": reduction(meta, "*.ffn.down.gen_b.b"),
        "task_dim": size(meta, "task_emb.*", 0, ("task_embedding_dim",), 16),
        "hidden": size(meta, "*.hyper.mlp1.b", 0, ("task_hidden_dim",), 12),
        "projected": size(meta, "*.hyper.mlp2.b", 0, ("projected_task_embedding_dim",), 8),
    }
    return make_method(Hyperformer, options, TASKS)


def _prompt(meta: Meta, family: str) -> Method:
    several = any(name.startswith("enc.prompt.vqa.") for name in meta.get("trainable", ()))
    options = {
        "length": size(meta, "enc.prompt*.emb", 0, ("encoder_prompt_len", "prompt_len"), 3),
        "mid": size(meta, "enc.prompt*.in.b", 0, ("mid_dim",), 10),
        "sharing": "multiple" if several else "single",
    }
    return make_method(Prompt, options, TASKS)


def _nothing(backbone: Backbone, meta: Meta) -> Named:
    return {}


ADAPTED: dict[str, Adapted] = {
    "vl_adapter": _vl_adapter("single"),
    "multi_adapter": _vl_adapter("multiple"),
    "half_shared_up": _vl_adapter("half_shared_up"),
    "half_shared_down": _vl_adapter("half_shared_down"),
    "lora": _lora("single"),
    "multi_lora": _lora("multiple"),
    "compacter": Adapted(_compacter, adapters),
    "hyperformer": Adapted(_hyperformer, hyper_networks),
    "prompt": Adapted(_prompt, prompts),
    "bitfit": Adapted(lambda meta, family: BitFit(), _nothing),
    "full": Adapted(lambda meta, family: Full(), _nothing),
}
