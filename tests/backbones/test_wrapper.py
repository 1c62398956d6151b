"""A wrapper passes every member and trait of a backbone on to the backbone inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from petlbench.methods.lst.method import LST
from petlbench.methods.m2ist.method import M2IST
from petlbench.methods.prompt import Prompt
from torch import nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method
from petlbench.api.registries import BACKBONES
from petlbench.api.wrapper import Wrapper
from petlbench.backbones.supplied import supply
from tests.backbone_factory import small_tiny

OWN = {  # members that a wrapper does not pass on, and why
    "Config": "of a family, from whose configuration no wrapper is made",
    "sizes": "of a family",
    "refusals": "of a family",
    "options_of": "of a family",
    "configured": "of a family",
    "abilities_of": "of a family",
    "files": "of a family",
    "freeze": "parameters of the wrapper count too",
    "unfreeze": "parameters of the wrapper train too",
}
NAMES = {"host_parameters", "fixed_parameters", "undecayed_parameters", "head_parameters"}


def members(cls: type) -> set[str]:
    """Return the names of public members, including those that `__init__` sets."""
    declared = {name for base in cls.__mro__ if base is not nn.Module for name in inspect.get_annotations(base)}
    made = {"stacks", "own_heads"}  # by `__init__`
    public = {name for name in {*dir(cls), *declared, *made} if not name.startswith("_")}
    return public - set(dir(nn.Module)) - set(inspect.get_annotations(nn.Module))


MEMBERS = sorted(members(Backbone) - OWN.keys())


class Spy(Wrapper):
    """Record every name that is asked for."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def __getattribute__(self, name: str) -> Any:
        if name not in MEMBERS:
            return super().__getattribute__(name)
        if not callable(getattr(Backbone, name, None)):
            return f"the inner {name}"
        return lambda *args, **options: {"parameter"} if name in NAMES else (name, args, options)


def arguments(function: Callable[..., Any]) -> dict[str, str]:
    return {name: f"an argument {name}" for name in inspect.signature(function).parameters}


def test_there_are_members_to_look_at() -> None:
    assert {"stacks", "own_heads", "config", "initialisation", "norm_bias", "embed_pair", "pad_id"} <= set(MEMBERS)
    assert OWN.keys() <= members(Backbone)


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_is_handed_on_or_said_to_be_the_wrapper_s_own(name: str) -> None:
    member = getattr(Wrapper(Spy()), name)
    if not callable(getattr(Backbone, name, None)):
        assert member == f"the inner {name}"
    elif name in NAMES:
        assert member() == {"inner.parameter"}
    elif name == "fuse":
        assert member("text", "image", task="vqa") == ("fuse", ("text", "image"), {"task": "vqa"})
    else:
        given = arguments(member)
        asked, args, options = member(**given)
        assert asked == name and {*args, *options.values()} == set(given.values())


def test_what_a_wrapper_sets_is_its_own() -> None:
    inner = small_tiny()
    wrapper = Wrapper(inner)
    wrapper.note, wrapper.norm_bias = "wrapped", False
    assert (wrapper.note, wrapper.norm_bias) == ("wrapped", False)
    assert inner.note != "wrapped" and inner.norm_bias


@pytest.mark.parametrize("method", [LST, M2IST, Prompt])
def test_the_wrappers_of_methods_have_the_traits_and_roles_of_their_host(method: type[Method]) -> None:
    cls: Any = BACKBONES.get("vl_t5")
    host = cls(cls.configured("vl_t5:tiny", {}))
    roles = host.pretrained_roles()
    adapted = method().adapt(host)
    assert isinstance(adapted, Wrapper) and adapted.inner is host
    assert (adapted.initialisation, adapted.norm_bias, adapted.stacked_decoder) == ("t5", False, True)
    assert adapted.pretrained_roles() == roles and adapted.pretrained_hosts == host.pretrained_hosts


def test_a_supplied_part_changes_no_published_part_of_a_backbone() -> None:
    cls: Any = BACKBONES.get("transvg")
    host = cls(cls.configured("transvg:tiny", {}))
    supplied = supply(host, frozenset({"decode"}))
    assert isinstance(supplied, Wrapper) and supplied.own_head("rec") is host.own_heads["rec"]
    assert supplied.pretrained_roles() == ("vision", "text"), "its fusion encoder is trained whole by every method"
    assert not [name for name, _ in supplied.named_parameters() if not name.startswith(("inner.", "supplied."))]
