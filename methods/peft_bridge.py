"""Every tuner of Hugging Face's peft library whose layers fit into a backbone's projections or norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import About, Method, StackedConfig
from petlbench.api.sites import Parallel, Projection, Stack
from petlbench.core.messages import did_you_mean

from .peft_library import FITTED, FittedSizes, library, quietly

NAME = "default"  # the name of the one adapter in each of peft's layers
NORMS = "ln_tuning"  # the type that goes into norms instead of projections
TARGETS: Mapping[str, tuple[str, ...]] = {"ia3": ("k", "v", "out")}  # its paper's targets; other types: q and v
OURS = ("target_modules", "target_parameters", "feedforward_modules", "exclude_modules", "modules_to_save", "bias",
        "trainable_token_indices", "layer_replication", "peft_type", "task_type", "inference_mode")  # fmt: skip
FROM_VALUES = ("adamss",)  # reads the weights when it is created, which the meta device cannot give
# A merged type computes the same to 1e-9 in double precision; these types cannot: c3a and deft compute in float32
# whatever the host's precision, lily routes by input, and beft needs a bias to merge into, which T5 lacks.
UNMERGED = ("adamss", "beft", "c3a", "deft", "lily")
DRAWN = ("c3a", "fourierft", "unilora", "vblora")  # random initial values change the output
ROUNDED = ("adamss", "deft", "hra", "osf", "psoft")  # decompose or reflect the weight, which rounds the output


class Adapted(Parallel):
    """y = path(x): peft's layer replaces the projection `base`, and itself holds and computes it.

    `rows` only names the role of a packed projection that selected it; the layer computes the whole projection.
    """

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.path(x)
        return y


@dataclass(frozen=True)
class Target:
    """A linear projection or norm to adapt: an attribute of `owner`.

    `key` is its name in the small module tree that peft receives. The last part is the same in every layer, so that
    types which share weights between layers can group them.
    """

    key: str
    owner: nn.Module
    name: str
    rows: slice | None = None

    @property
    def module(self) -> nn.Module:
        module = getattr(self.owner, self.name)
        assert isinstance(module, nn.Module)
        return module


class PeftConfig(StackedConfig):
    """A type of peft's, its targets, and its own options."""

    type: str = Field(
        "lora", description="a type of peft's, in lower case: `petlbench list methods 'peft:*'` shows all"
    )
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="projections among q, k, v, o, in, out; null: q and v; for ia3: k, v and out. A packed projection "
        "is one module: any of q, k, v selects all of it. Not for ln_tuning, which adapts norms",
    )
    options: dict[str, Any] = Field(
        {}, description="fields of peft's own configuration of this type; sizes not given here fit the backbone"
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        kinds = {str(variant.get("type", "lora")) for variant in Peft.variants.values()}
        if self.type in Peft.impossible:
            raise ValueError(f"peft's type '{self.type}' cannot be used here: {Peft.impossible[self.type]}")
        if self.type not in kinds:
            hint = did_you_mean(self.type, kinds) or f": there are {', '.join(sorted(kinds))}"
            raise ValueError(f"peft has no type '{self.type}'{hint}")
        if self.type == NORMS and self.targets:
            raise ValueError(f"{NORMS} goes into norms: leave targets out")
        if self.options:
            self._check_options()
        return self

    def _check_options(self) -> None:
        """Check the options' names, and the values as far as peft checks them without a model."""
        config, _ = library(self.type)
        fields = {field.name for field in dataclasses.fields(config)} - set(OURS)
        for name in self.options:
            if name in OURS:
                raise ValueError(f"option '{name}' does not apply here: choose modules with `targets` and `stacks`")
            if name not in fields:
                raise ValueError(f"peft's type '{self.type}' has no option '{name}'{did_you_mean(name, fields)}")
        quietly(config, **{"total_step": 1} if self.type == "adalora" else {}, **self.options)


class Peft(Method[PeftConfig]):
    """y = l(x), where l is the layer of peft's that replaces a projection y = x W^T + b; its type decides the formula.

    Formulas and papers are those of peft's documentation. The library's own code runs, draws and merges its layers;
    ours only chooses where they go. Differences from peft's own use: the code of its model wrapper does not run.
    So AdaLoRA keeps all its ranks (pruning them needs a call in each step) and adds no orthogonality term to the
    loss, and AdaMSS allocates no subspaces. Default sizes are peft's, or smaller if the backbone's widths need it;
    FourierFT's scale follows them. AdaMSS takes its shapes from weights, on the meta device from random ones. A seed
    among the options fixes frozen random projections (VeRA and similar types).
    """

    Config = PeftConfig
    about = About(
        paper="the tuners of Hugging Face's peft library, each with its own paper",
        trains="what the type adds to query and value projections; `ln_tuning`: all norms",
        verified="the installed peft, whose layers run; `lora` against the method lora",
    )
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "lora": {},
        "dora": {"options": {"use_dora": True}},
        "rslora": {"options": {"use_rslora": True}},
        "pissa": {"options": {"init_lora_weights": "pissa"}},
        "olora": {"options": {"init_lora_weights": "olora"}},
        "adalora": {"type": "adalora"},
        "adamss": {"type": "adamss"},
        "beft": {"type": "beft"},
        "boft": {"type": "boft"},
        "c3a": {"type": "c3a"},
        "deft": {"type": "deft"},
        "delora": {"type": "delora"},
        "fourierft": {"type": "fourierft"},
        "glora": {"type": "glora"},
        "gralora": {"type": "gralora"},
        "hira": {"type": "hira"},
        "hra": {"type": "hra"},
        "ia3": {"type": "ia3"},
        "lily": {"type": "lily"},
        "ln_tuning": {"type": "ln_tuning"},
        "loha": {"type": "loha"},
        "lokr": {"type": "lokr"},
        "miss": {"type": "miss"},
        "oft": {"type": "oft"},
        "osf": {"type": "osf"},
        "peanut": {"type": "peanut"},
        "psoft": {"type": "psoft"},
        "pvera": {"type": "pvera"},
        "randlora": {"type": "randlora"},
        "road": {"type": "road"},
        "supertuning": {"type": "supertuning"},
        "tinylora": {"type": "tinylora"},
        "unilora": {"type": "unilora"},
        "vblora": {"type": "vblora"},
        "vera": {"type": "vera"},
        "waveft": {"type": "waveft"},
    }
    impossible: ClassVar[Mapping[str, str]] = {
        "adaption_prompt": "prompts in every layer, written for the attention of LLaMA and its like alone",
        "cartridge": "prompt learning: a trained key-value cache of peft's wrapper around a causal language model",
        "cpt": "prompt learning: needs peft's wrapper around a causal language model; see method prompt",
        "frod": "computes with sparse tensors, whose memory cannot be accounted for",
        "multitask_prompt_tuning": "prompt learning: needs peft's wrapper around a language model; see method prompt",
        "p_tuning": "prompt learning: needs peft's wrapper around a language model; see method prompt",
        "poly": "every pass must be given task ids, which only peft's own wrapper hands to its layers",
        "prefix_tuning": "prompt learning: key-value prefixes of peft's wrapper around a language model",
        "prompt_tuning": "prompt learning: needs peft's wrapper around a language model; see method prompt",
        "shadow": "a second model beside a causal language model, not layers in it",
        "shira": "computes with sparse tensors, whose memory cannot be accounted for",
        "trainable_tokens": "trains rows of a token embedding, which is no site",
        "xlora": "mixes adapters that were trained before, and needs their files",
    }
    recipe: ClassVar[Mapping[str, Any]] = {"lr": 1e-3}  # the method lora's; the types' own papers differ widely

    def __init__(self, config: PeftConfig | None = None) -> None:
        super().__init__(config)
        kind, options = self.config.type, self.config.options
        started = any(name.startswith("init") and value is not True for name, value in options.items())
        self.identity = kind not in (*DRAWN, *ROUNDED) and not started
        self.mergeable = kind not in UNMERGED
        self._from_values = kind in FROM_VALUES or started
        self._layers: list[tuple[Target, nn.Module]] = []

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        targets = list(self._targets(backbone))
        if not targets:
            raise ValueError(f"no projection called {' or '.join(self._roles())} in the chosen stacks")
        flags = [(p, p.requires_grad) for target in targets for p in target.module.parameters()]
        self._layers = list(zip(targets, self._injected(targets), strict=True))
        for parameter, flag in flags:  # peft freezes the targets, but a host part may train
            parameter.requires_grad_(flag)
        for target, layer in self._layers:
            if self.config.type == NORMS:
                _train_original(layer, target.module)
                setattr(target.owner, target.name, layer)
            else:
                setattr(target.owner, target.name, Adapted(target.module, layer, target.rows))
        return backbone

    def merge(self) -> None:
        """Fold every layer into its projection by peft's own code, and remove it."""
        if not self.mergeable:
            raise NotImplementedError(f"peft's type '{self.config.type}' cannot be merged into the weights")
        for target, layer in self._layers:
            layer.merge()  # type: ignore[operator]
            if self.config.type == NORMS:
                setattr(target.owner, target.name, layer.base_layer)
            else:
                Projection(target.owner, target.name).remove(layer)
        self._layers = []

    def _roles(self) -> tuple[str, ...]:
        return self.config.targets or TARGETS.get(self.config.type, ("q", "v"))

    def _targets(self, backbone: Backbone) -> Iterator[Target]:
        """Yield every module to adapt once, since a packed projection has several roles."""
        names = {id(backbone.stack(role)): role for role in backbone.roles()}
        find = _norms if self.config.type == NORMS else self._projections
        seen: set[tuple[int, str]] = set()
        for stack in self.stacks(backbone):
            for target in find(stack, names[id(stack)]):
                if (place := (id(target.owner), target.name)) not in seen:
                    seen.add(place)
                    yield target

    def _projections(self, stack: Stack, name: str) -> Iterator[Target]:
        for index, layer in enumerate(stack):
            for part, sublayer in layer.items():
                for role in self._roles():
                    projection = sublayer.projections.get(role)
                    for i, single in enumerate(projection.singles() if projection else ()):
                        yield Target(f"layers.{index}.{name}_{part}_{role}_{i}", single.owner, single.name, single.rows)

    def _injected(self, targets: Sequence[Target]) -> list[nn.Module]:
        """Return peft's layer around each target, on the target's device and in its precision."""
        kind, modules = self.config.type, {target.key: target.module for target in targets}
        device = next(targets[0].module.parameters()).device
        stands_in = device.type == "meta" and self._from_values
        with torch.device("cpu"):  # values are the same on every device
            tree = _tree({key: _alike(m) if stands_in else m for key, m in modules.items()})
            config, tuner = library(kind)
            quietly(tuner, tree, quietly(config, **self._options(list(modules.values()), list(modules))), NAME)
        layers = [tree.get_submodule(key) for key in modules]
        for layer, module in zip(layers, modules.values(), strict=True):
            if layer is module:
                raise ValueError(f"peft's type '{kind}' skips a {type(module).__name__}")
            layer.to(device, module.weight.dtype)  # type: ignore[arg-type]
            layer.base_layer = module
            _freeze_the_rest(layer)
        return layers

    def _options(self, modules: Sequence[nn.Module], keys: Sequence[str]) -> dict[str, Any]:
        """Return the options of peft's configuration: targets by their last names, fitted sizes, the user's options."""
        kind = self.config.type
        roles = sorted({key.rpartition(".")[2] for key in keys})
        options: dict[str, Any] = {"target_modules": roles}
        if kind == "ia3":  # it scales the input of a feed-forward network's second projection
            options["feedforward_modules"] = [role for role in roles if role.rpartition("_")[0].endswith("_out")]
        if kind in FITTED:
            shapes = [(m.in_features, m.out_features) for m in modules if isinstance(m, nn.Linear)]
            options |= FITTED[kind](FittedSizes(shapes))
        return options | self.config.options


def _norms(stack: Stack, name: str) -> Iterator[Target]:
    """Yield every norm of the stack; a norm with one child per modality yields each child."""
    around = [(stack, part, f"around.{name}") for part in ("embedding_norm", "final_norm") if getattr(stack, part)]
    inside = [
        (sublayer, "norm", f"layers.{index}.{name}_{part}")
        for index, layer in enumerate(stack)
        for part, sublayer in layer.items()
    ]
    for owner, attribute, key in [*around, *inside]:
        norm: nn.Module = getattr(owner, attribute)
        if next(norm.parameters(recurse=False), None) is not None:
            yield Target(f"{key}_{attribute}", owner, attribute)
            continue
        for child, module in norm.named_children():
            if next(module.parameters(recurse=False), None) is not None:
                yield Target(f"{key}_{attribute}_{child}", norm, child)


def _train_original(layer: nn.Module, norm: nn.Module) -> None:
    """Swap the norm and peft's trainable copy of it, so that the backbone's own parameters train."""
    layer.is_side_module = True  # type: ignore[assignment]
    copies = layer.ln_tuning_layers
    assert isinstance(copies, nn.ModuleDict)
    layer.base_layer, copies[NAME] = copies[NAME].requires_grad_(False), norm.requires_grad_(True)


def _freeze_the_rest(layer: nn.Module) -> None:
    """Freeze parameters that peft does not count as a type's weights (AdaLoRA's ranks); peft itself loses this when it
    moves them to another device."""
    for name in layer.other_param_names:  # type: ignore[union-attr]
        if isinstance(rest := getattr(layer, name, None), nn.Module):
            rest.requires_grad_(False)


def _alike(module: nn.Module) -> nn.Module:
    """Return a projection of the same shape with random values."""
    assert isinstance(module, nn.Linear)
    return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)


def _tree(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Arrange modules in a tree by their dotted names."""
    root = nn.ModuleDict()
    for key, module in modules.items():
        *path, last = key.split(".")
        node = root
        for part in path:
            if part not in node:
                node[part] = nn.ModuleDict()
            child = node[part]
            assert isinstance(child, nn.ModuleDict)
            node = child
        node[last] = module
    return root
