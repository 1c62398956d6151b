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
    """Options of a method; the description of each gives meaning, range and source of its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StackedConfig(MethodConfig):
    """Options of a method that adapts whole stacks."""

    stacks: tuple[str, ...] | None = Field(
        None,
        description="roles (vision, text, encoder, decoder, fusion) to adapt; null: all that the backbone offers, "
        "except those that every method trains whole",
    )


@dataclass(frozen=True)
class SizeOption:
    """The option that sets a method's size, and its values along a curve, small to large."""

    field: str
    values: tuple[float | int, ...]


@dataclass(frozen=True)
class About:
    """Facts about a method for the table of methods."""

    paper: str  # authors, venue, year
    trains: str  # besides task heads and host parts
    verified: str  # the authors' material that it was checked against
    home: str = "vl_bart"  # the backbone that its authors use
    task: str = "vqa"  # the task for which parameters are counted on `home`


C = TypeVar("C", bound=MethodConfig)


def __getattr__(name: str) -> Any:
    if name != "Knob":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    warn_of("Knob", "SizeOption")
    return SizeOption


class Method(FormerNames, ABC, Generic[C]):
    """A way of adapting a backbone. It uses sites; it knows no task's code, data set, optimizer or device.

    A method states its properties as attributes, and `petlbench check` tests them. If a property depends on the
    configuration, `__init__` sets it on the instance.
    """

    former_names: ClassVar[Mapping[str, str]] = {
        "knob": "size_option",
        "dead": "unused_parameters",
        "detached": "no_backbone_gradient",
    }
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    config: C
    tasks: tuple[str, ...] = ()  # names of the cell's tasks, as in `Pass.task`; see `make_method`
    about: ClassVar[About | None] = None
    # Options by variant, for `method:variant`. Literals, because listing reads them without importing the module.
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    impossible: ClassVar[Mapping[str, str]] = {}  # variants that one would expect: the reason why they cannot exist
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
    baseline: ClassVar[bool] = False  # costs of others are given in percent of its own
    mixes_rows: str = ""  # why predictions depend on other rows of the batch, if they do in the authors' code

    def __init__(self, config: C | None = None) -> None:
        self.config = cast(C, self.Config()) if config is None else config

    @abstractmethod
    def adapt(self, backbone: Backbone) -> Backbone:
        """Freeze, insert, and return the backbone to use: the same object, or a wrapper that is a Backbone.

        Raises ValueError, with the reason, if it cannot adapt this backbone. It must work on the meta device, where the
        suite tries every pair before anything runs.
        """

    def default_recipe(self, family: str) -> dict[str, Any]:
        """Return the authors' training options on a family of backbones, for this configuration."""
        return {**self.recipe, **self.recipes.get(family, {})}

    def host_options(self, family: str) -> dict[str, Any]:
        """Return options of the backbone `family` that this configuration needs, whatever the tasks.

        They become part of the cell.
        """
        return {}

    def merge(self) -> None:
        """Fold the inserted modules into the weights, if that is possible."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged into the weights")

    def stacks(self, backbone: Backbone) -> list[Stack]:
        """Return the stacks to adapt. Raises ValueError if the backbone does not offer a role."""
        roles = getattr(self.config, "stacks", None) or backbone.pretrained_roles()
        if unknown := set(roles) - set(backbone.roles()):
            raise ValueError(f"no stack '{unknown.pop()}' in this backbone: it has {', '.join(backbone.roles())}")
        return [backbone.stack(role) for role in roles]


def make_method(cls: type[Method], options: Mapping[str, Any], tasks: Sequence[str] = ()) -> Method:
    """Return a method of this class with these options and its cell's tasks. Every method is made here."""
    method = cls(cls.Config(**options))
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
    """Move `module` to the device and precision of `like`'s parameters, and return it."""
    reference = next(like.parameters())
    return module.to(reference.device, reference.dtype)


def adapt(method: Method, backbone: Backbone) -> tuple[Backbone, Snapshot]:
    """Return the adapted backbone, and a handle whose `restore` recovers the original bit for bit."""
    handle = Snapshot(backbone)
    return method.adapt(backbone), handle
