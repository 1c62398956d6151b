"""Find methods and variants by name: `vl_pet:small` is the method `vl_pet` with the options of its variant `small`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from petlbench.api.registries import METHODS
from petlbench.core.cell import MethodSpec
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean
from petlbench.core.registry import Registry, is_wildcard

if TYPE_CHECKING:
    from petlbench.api.method import Method


def resolve_variant(spec: MethodSpec, registry: Registry[Method] = METHODS) -> MethodSpec:
    """Split `name:variant`. The spec's own options override the variant's; its `variant` defaults to that name.

    Raise UserError if the method lacks the variant, or says that it cannot be run.
    """
    name, _, asked = spec.name.partition(":")
    if not asked:
        return spec
    cls = registry.get(name)
    if asked in cls.impossible:
        raise UserError(f"method '{spec.name}' cannot be run: {cls.impossible[asked]}")
    if asked not in cls.variants:
        hint = did_you_mean(asked, cls.variants) or f": there are {', '.join(cls.variants) or 'none'}"
        raise UserError(f"method '{name}' has no variant '{asked}'{hint}")
    config = overlaid(cls.variants[asked], spec.config)
    return spec.model_copy(update={"name": name, "variant": spec.variant or asked, "config": config})


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings. `above` wins, but mappings under the same key are merged in turn."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = overlaid(old, value) if both else value  # type: ignore[arg-type]
    return merged


def matches(spec: MethodSpec, pattern: str) -> bool:
    """Return whether the pattern matches the spec's name, or its `name:variant`."""
    return fnmatchcase(spec.name, pattern) or fnmatchcase(spec.label, pattern)


def specs_beyond(pool: Sequence[MethodSpec], pattern: str, registry: Registry[Method] = METHODS) -> list[MethodSpec]:
    """Return the registered methods and variants that `pattern` names and `pool` lacks.

    A wildcard gives every match that has other options than each spec of the pool; a name gives itself, unless the
    pool has it. Raise UserError if neither the pool nor the registry has a match.
    """
    if not is_wildcard(pattern):
        in_pool = any(matches(spec, pattern) for spec in pool)
        return [] if in_pool else [resolve_variant(_registered(pattern, registry), registry)]
    specs = list(pool)
    family = pattern.partition(":")[0]
    for name in registry.names(family) if ":" in pattern else registry.names():
        for spec in _all(name, registry) if ":" in pattern or fnmatchcase(name, pattern) else []:
            if matches(spec, pattern) and not any(_same(spec, other, registry) for other in specs):
                specs.append(spec)
    if not any(matches(spec, pattern) for spec in specs):
        _registered(pattern, registry)
    return specs[len(pool) :]


def method_specs(patterns: Sequence[str], registry: Registry[Method] = METHODS) -> list[MethodSpec]:
    """Return the methods and variants that the patterns name, in their order, with their default configurations."""
    specs: list[MethodSpec] = []
    for pattern in patterns:
        specs += specs_beyond(specs, pattern, registry)
    return specs


def _registered(name: str, registry: Registry[Method]) -> MethodSpec:
    registry.origin(name.partition(":")[0] if ":" in name else name)  # UserError if there is none
    return MethodSpec(name=name)


def _all(name: str, registry: Registry[Method]) -> list[MethodSpec]:
    """Return the method and its variants; `_same` later drops the variant that is the default."""
    cls = registry.get(name)
    named = [resolve_variant(MethodSpec(name=f"{name}:{variant}"), registry) for variant in cls.variants]
    return [MethodSpec(name=name), *named]


def _same(a: MethodSpec, b: MethodSpec, registry: Registry[Method]) -> bool:
    if a.name != b.name:
        return False
    cls = registry.get(a.name)
    try:
        return bool(cls.Config(**a.config) == cls.Config(**b.config))
    except ValueError:  # one is not a valid configuration; other code reports it in the right place
        return False
