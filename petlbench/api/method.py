"""The base class of methods: written once, against sites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from petlbench.api.backbone import Backbone
from petlbench.api.sites import Stack
from petlbench.api.snapshot import Snapshot
from petlbench.core.former_names import FormerNames, warn_of


class MethodConfig(BaseModel):
    """Options of a method; every field says meaning, range and the source of its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StackedConfig(MethodConfig):
    """Options of a method that goes into whole stacks."""

    stacks: tuple[str, ...] | None = Field(
        None,
        description="roles (vision, text, encoder, decoder, fusion) it goes into; null: all that the backbone offers, "
        "but for those that every method trains whole",
    )


@dataclass(frozen=True)
class SizeOption:
    """The option that sets a method's size, and the values that a curve runs through, small to large."""

    field: str
    values: tuple[float | int, ...]


@dataclass(frozen=True)
class About:
    """What a table of methods says of one."""

    paper: str  # authors, venue, year
    trains: str  # besides task heads and host parts
    verified: str  # against what of its authors'
    home: str = "vl_bart"  # the backbone that its authors use
    task: str = "vqa"  # for which parameters are counted on it


C = TypeVar("C", bound=MethodConfig)


def __getattr__(name: str) -> Any:
    if name != "Knob":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    warn_of("Knob", "SizeOption")
    return SizeOption


class Method(FormerNames, ABC, Generic[C]):
    """One way of adapting a backbone. Knows sites; knows no task's code, data set, optimizer or device.

    What a method claims of itself is an attribute, and `petlbench check` holds it to that; where a claim depends on the
    configuration, `__init__` sets it on the instance.
    """

    former_names: ClassVar[Mapping[str, str]] = {
        "knob": "size_option",
        "dead": "unused_parameters",
        "detached": "no_backbone_gradient",
    }
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    config: C
    tasks: tuple[str, ...] = ()  # of its cell, by name, as a pass says them; see `make_method`
    about: ClassVar[About | None] = None
    # `method:variant`: options by name. Literals, since they are listed without an import of the module.
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    impossible: ClassVar[Mapping[str, str]] = {}  # variants that one would expect, and why they cannot be
    recipe: ClassVar[Mapping[str, Any]] = {}  # its authors' training options, where they differ from the default
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # the same on one family of backbones, by its name
    size_option: ClassVar[SizeOption | None] = None
    identity: bool = False  # before training, the adapted backbone computes what the untouched one does
    mergeable: bool = False  # `merge` folds it into the weights
    no_backbone_gradient: bool = False  # no gradient enters the backbone, and none of its activations is saved
    unused_parameters: Mapping[str, str] = {}  # wildcard of trainable names that never get a gradient: the reason
    # Wildcard of trainable names that get one on some tasks only (a decoder's, a modality's): the reason.
    conditional: Mapping[str, str] = {}
    floor: ClassVar[bool] = False  # its score counts as no gain
    baseline: ClassVar[bool] = False  # others' costs are told in percent of its own
    mixes_rows: str = ""  # why a row's predictions depend on those beside it, where the authors' code does so

    def __init__(self, config: C | None = None) -> None:
        self.config = cast(C, self.Config()) if config is None else config

    @abstractmethod
    def adapt(self, backbone: Backbone) -> Backbone:
        """Freeze, insert, and return the backbone to use: the same object, or a wrapper that is a Backbone.

        Raises ValueError, with the reason, for a backbone that it cannot go into. Must work on the meta device, where
        every pair is tried before anything runs.
        """

    def default_recipe(self, family: str) -> dict[str, Any]:
        """Its authors' training options on a family of backbones, in this configuration."""
        return {**self.recipe, **self.recipes.get(family, {})}

    def host_options(self, family: str) -> dict[str, Any]:
        """Options of the backbone `family` that this configuration of the method needs, whatever the tasks.

        They go into the cell.
        """
        return {}

    def merge(self) -> None:
        """Fold what was inserted into the weights, where that is possible."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged into the weights")

    def stacks(self, backbone: Backbone) -> list[Stack]:
        """The stacks this method goes into. Raises ValueError for a role that the backbone does not offer."""
        roles = getattr(self.config, "stacks", None) or backbone.pretrained_roles()
        if unknown := set(roles) - set(backbone.roles()):
            raise ValueError(f"no stack '{unknown.pop()}' in this backbone: it has {', '.join(backbone.roles())}")
        return [backbone.stack(role) for role in roles]


def make_method(kind: type[Method], options: Mapping[str, Any], tasks: Sequence[str] = ()) -> Method:
    """A method of this class with these options, told the tasks of its cell: every method is made here."""
    method = kind(kind.Config(**options))
    method.tasks = tuple(tasks)
    return method


def train(*modules: nn.Module) -> None:
    """Let all parameters of these modules train."""
    for module in modules:
        module.requires_grad_(True)


def train_biases(module: nn.Module) -> None:
    """Let every parameter called `bias` train (not tables whose name merely contains the word)."""
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] == "bias":
            parameter.requires_grad_(True)


def place(module: nn.Module, like: nn.Module) -> nn.Module:
    """`module` on the device and in the precision of `like`'s parameters."""
    reference = next(like.parameters())
    return module.to(reference.device, reference.dtype)


def adapt(method: Method, backbone: Backbone) -> tuple[Backbone, Snapshot]:
    """The adapted backbone, and the handle whose `restore` gives the original back bit for bit."""
    handle = Snapshot(backbone)
    return method.adapt(backbone), handle
