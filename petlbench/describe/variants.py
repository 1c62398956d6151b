"""Variants and other class attributes of registered classes, read from source code.

Listing the variants so takes a tenth of a second, because neither torch nor the methods have to be imported.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from petlbench.api.registries import METHODS
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean
from petlbench.core.registry import Registry
from petlbench.core.source_code.names import Definition, bound_in, member, module_of


@dataclass(frozen=True)
class Declared:
    """The variants of a method with their options, and the impossible ones with the reason."""

    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    impossible: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A line of the list: `method:variant` with its options, why it is impossible, or why the method is broken."""

    name: str
    distribution: str
    options: Mapping[str, Any] | None = None
    impossible: str | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def as_row(self) -> dict[str, str]:
        """Return the texts for a terminal."""
        text = "" if self.options is None else json.dumps(self.options) if self.options else "the default"
        if self.impossible is not None:
            text = f"impossible: {self.impossible}"
        row = {"name": self.name, "distribution": self.distribution, "options": text}
        return row if self.error is None else {**row, "error": self.error}


def list_variants(pattern: str) -> list[Variant]:
    """Return the variants that match `method:variant`; both parts may have wildcards.

    A method that cannot be imported is one entry with the error. Raises UserError if nothing matches.
    """
    family, _, wanted = pattern.partition(":")
    methods = METHODS.names(family)
    if not methods:
        METHODS.origin(family)  # raises UserError
    variants = [variant for method in methods for variant in _variants_of(method)]
    matching = [variant for variant in variants if variant.error or fnmatchcase(variant.name.partition(":")[2], wanted)]
    if not matching:
        names = [variant.name for variant in variants]
        choices = f": there are {', '.join(names)}" if names else f": {', '.join(methods)} declares none"
        raise UserError(f"no variant matches '{pattern}'{did_you_mean(pattern, names) or choices}")
    return matching


def _variants_of(method: str) -> list[Variant]:
    origin = METHODS.origin(method)
    try:
        declaration = declared(method)
    except UserError as error:
        return [Variant(method, origin, error=str(error))]
    return [
        *(Variant(f"{method}:{name}", origin, options) for name, options in declaration.variants.items()),
        *(Variant(f"{method}:{name}", origin, impossible=reason) for name, reason in declaration.impossible.items()),
    ]


def declared(method: str) -> Declared:
    """Return what the registered method declares. Raises UserError as `attribute` does."""
    return Declared(attribute(METHODS, method, "variants"), attribute(METHODS, method, "impossible"))


def attribute(registry: Registry[Any], name: str, wanted: str) -> Any:
    """Return the class attribute `wanted` of a registered class.

    The class is imported only where its source code does not give the value as a literal. Raises UserError for a name
    that is not registered, and for a class that has to be imported and cannot be.
    """
    module, _, path = registry.target(name).partition(":")
    try:
        return _literal(module.strip(), path.partition("[")[0].strip(), wanted)
    except (LookupError, ValueError, TypeError, UserError):  # the import says what is wrong with the class
        return getattr(registry.get(name), wanted)


def _literal(module: str, name: str, wanted: str) -> Any:
    """Return the value that a class, or the first of its bases that sets it, gives to the attribute `wanted`.

    Raises LookupError, ValueError or TypeError where only an import can tell.
    """
    where = member(module, name)
    found = module_of(where.module) if isinstance(where, Definition) else None
    if not isinstance(where, Definition) or found is None:
        raise LookupError(name)
    definitions = [found.statements[number] for number in found.by_name.get(where.name, [])]
    if len(definitions) != 1 or not isinstance(definitions[0], ast.ClassDef):
        raise LookupError(name)
    for statement in reversed(definitions[0].body):
        if wanted in bound_in([statement], found.package).names:
            match statement:
                case ast.AnnAssign(value=None):  # an annotation alone sets nothing
                    continue
                case ast.Assign(targets=[ast.Name()], value=value) | ast.AnnAssign(target=ast.Name(), value=value):
                    return ast.literal_eval(value)  # type: ignore[arg-type]  # not None, which is the case above
            raise LookupError(name)
    match definitions[0].bases:
        case [ast.Name(id=base)] | [ast.Subscript(value=ast.Name(id=base))]:
            return _literal(where.module, base, wanted)
    raise LookupError(name)  # with several bases, Python's order of look-up decides


def declaring(registry: Registry[Any], names: Iterable[str], wanted: str) -> list[str]:
    """Return those of `names` whose class has the attribute `wanted`, neither false nor empty.

    Names without a class, and classes that cannot be imported, are left out.
    """
    found = []
    for name in dict.fromkeys(names):
        try:
            if attribute(registry, name, wanted):
                found.append(name)
        except UserError:
            continue
    return found
