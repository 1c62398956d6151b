"""Methods and their variants by name: `vl_pet:small` is the method `vl_pet` with the options that it calls `small`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from petlbench.api.registries import METHODS
from petlbench.core.cell import MethodSpec
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean
from petlbench.core.registry import Registry

if TYPE_CHECKING:
    from petlbench.api.method import Method

WILDCARDS = frozenset("*?[")


def resolve_variant(spec: MethodSpec, registry: Registry[Method] = METHODS) -> MethodSpec:
    """`name:variant` taken apart: the variant's options beneath the spec's own, its name for want of another.

    Raises UserError for a variant that the method does not have, or that cannot be.
    """
    name, _, asked = spec.name.partition(":")
    if not asked:
        return spec
    kind = registry.get(name)
    if asked in kind.impossible:
        raise UserError(f"method '{spec.name}' cannot be run: {kind.impossible[asked]}")
    if asked not in kind.variants:
        hint = did_you_mean(asked, kind.variants) or f": there are {', '.join(kind.variants) or 'none'}"
        raise UserError(f"method '{name}' has no variant '{asked}'{hint}")
    config = overlaid(kind.variants[asked], spec.config)
    return spec.model_copy(update={"name": name, "variant": spec.variant or asked, "config": config})


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both together; where both have a mapping under a key, so are these."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        found[key] = overlaid(old, value) if both else value  # type: ignore[arg-type]
    return found


def matches(spec: MethodSpec, pattern: str) -> bool:
    """By name or by `name:variant`."""
    return fnmatchcase(spec.name, pattern) or fnmatchcase(spec.label, pattern)


def is_wildcard(pattern: str) -> bool:
    return bool(WILDCARDS & set(pattern))


def beyond(pool: Sequence[MethodSpec], pattern: str, registry: Registry[Method] = METHODS) -> list[MethodSpec]:
    """What `pattern` names besides `pool`: of a name or `name:variant` that one, of a wildcard every registered method
    and variant that no spec of the pool equals in its options.

    Raises UserError where neither the pool nor the registry has anything of that name.
    """
    if not is_wildcard(pattern):
        known = any(matches(spec, pattern) for spec in pool)
        return [] if known else [resolve_variant(_known(pattern, registry), registry)]
    found = list(pool)
    family = pattern.partition(":")[0]
    for name in registry.names(family) if ":" in pattern else registry.names():
        for spec in _all(name, registry) if ":" in pattern or fnmatchcase(name, pattern) else []:
            if matches(spec, pattern) and not any(_same(spec, other, registry) for other in found):
                found.append(spec)
    if not any(matches(spec, pattern) for spec in found):
        _known(pattern, registry)
    return found[len(pool) :]


def method_specs(patterns: Sequence[str], registry: Registry[Method] = METHODS) -> list[MethodSpec]:
    """Methods and variants that the patterns name, in their order, with their default configurations."""
    found: list[MethodSpec] = []
    for pattern in patterns:
        found += beyond(found, pattern, registry)
    return found


def _known(name: str, registry: Registry[Method]) -> MethodSpec:
    registry.origin(name.partition(":")[0] if ":" in name else name)  # UserError when there is none
    return MethodSpec(name=name)


def _all(name: str, registry: Registry[Method]) -> list[MethodSpec]:
    """The method and its variants; the variant that is the default goes by the method's name alone."""
    kind = registry.get(name)
    named = [resolve_variant(MethodSpec(name=f"{name}:{variant}"), registry) for variant in kind.variants]
    return [MethodSpec(name=name), *named]


def _same(a: MethodSpec, b: MethodSpec, registry: Registry[Method]) -> bool:
    if a.name != b.name:
        return False
    kind = registry.get(a.name)
    try:
        return bool(kind.Config(**a.config) == kind.Config(**b.config))
    except ValueError:  # one of them is no configuration, as will be said where it belongs
        return False
