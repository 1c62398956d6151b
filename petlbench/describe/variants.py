"""What registered classes declare, read off their source: listing variants imports neither a method nor torch."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import resolve_name
from typing import Any

from petlbench.api.registries import METHODS
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean
from petlbench.core.registry import Registry
from petlbench.core.source_code.files import place_of


@dataclass(frozen=True)
class Declared:
    """A method's variants with their options, and those that cannot be with the reason."""

    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    impossible: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """`method:variant` with its options, or the reason why it cannot be; `error`: the method cannot be read."""

    name: str
    distribution: str
    options: Mapping[str, Any] | None = None
    impossible: str | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def as_row(self) -> dict[str, str]:
        """Texts for a terminal."""
        options = "" if self.options is None else json.dumps(self.options) if self.options else "the default"
        says = options if self.impossible is None else f"impossible: {self.impossible}"
        row = {"name": self.name, "distribution": self.distribution, "options": says}
        return row if self.error is None else {**row, "error": self.error}


def list_variants(pattern: str) -> list[Variant]:
    """The variants that match `method:variant`, both with wildcards.

    A method that cannot be read is one entry with the error. Raises UserError where nothing matches.
    """
    family, _, wanted = pattern.partition(":")
    methods = METHODS.names(family)
    if not methods:
        METHODS.origin(family)  # says so
    everything = [one for method in methods for one in _of(method)]
    found = [one for one in everything if one.error or fnmatchcase(one.name.partition(":")[2], wanted)]
    if not found:
        known = [one.name for one in everything]
        there = f": there are {', '.join(known)}" if known else f": {', '.join(methods)} declares none"
        raise UserError(f"no variant matches '{pattern}'{did_you_mean(pattern, known) or there}")
    return found


def _of(method: str) -> list[Variant]:
    origin = METHODS.origin(method)
    try:
        has = declared(method)
    except UserError as error:
        return [Variant(method, origin, error=str(error))]
    return [
        *(Variant(f"{method}:{name}", origin, options) for name, options in has.variants.items()),
        *(Variant(f"{method}:{name}", origin, impossible=reason) for name, reason in has.impossible.items()),
    ]


def declared(method: str) -> Declared:
    """What the registered method declares. Raises UserError as `attribute` does."""
    return Declared(attribute(METHODS, method, "variants"), attribute(METHODS, method, "impossible"))


def attribute(registry: Registry[Any], name: str, wanted: str) -> Any:
    """The class attribute `wanted` of a registered class.

    The class is imported only where its source does not hold the literal, as one with several bases. Raises UserError
    for a name that is not registered, and for a class that has to be imported and cannot be.
    """
    module, _, path = registry.target(name).partition(":")
    try:
        return _value(module.strip(), path.partition("[")[0].strip(), wanted)
    except LookupError:
        return getattr(registry.get(name), wanted)


def declaring(registry: Registry[Any], names: Iterable[str], wanted: str) -> list[str]:
    """Those of `names` whose class has the attribute `wanted`, and not false or empty.

    A class that is not installed, or that cannot be imported, is not among them.
    """
    found = []
    for name in dict.fromkeys(names):
        try:
            if attribute(registry, name, wanted):
                found.append(name)
        except UserError:
            continue
    return found


@dataclass(frozen=True)
class ModuleSource:
    """A module's classes, and where the names come from that it imports: (module, name)."""

    classes: Mapping[str, ast.ClassDef]
    imports: Mapping[str, tuple[str, str]]


@cache
def _source(module: str) -> ModuleSource:
    """Raises LookupError for a module that cannot be read."""
    place = place_of(module)
    if place is None or place.file is None or place.file.suffix != ".py":
        raise LookupError(module)
    try:
        tree = ast.parse(place.file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LookupError(module) from error
    package = module if place.folders is not None else module.rpartition(".")[0]
    imports: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            imports |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
    return ModuleSource({node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}, imports)


def _value(module: str, name: str, attribute: str) -> Any:
    """The literal value of a class attribute, of the class or of the base that it has it from.

    Raises LookupError for what only an import can tell.
    """
    source = _source(module)
    if name in source.imports:
        return _value(*source.imports[name], attribute)
    if name not in source.classes:
        raise LookupError(name)
    for statement in reversed(source.classes[name].body):
        value = _assigned(statement, attribute)
        if value is not None:
            try:
                return ast.literal_eval(value)
            except (ValueError, TypeError) as error:
                raise LookupError(name) from error
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in source.classes[name].bases]
    above = [base.id if isinstance(base, ast.Name) else "" for base in bases]
    if len(above) != 1:  # with several bases the order of look-up is Python's business
        raise LookupError(name)
    return _value(module, above[0], attribute)


def _assigned(statement: ast.stmt, name: str) -> ast.expr | None:
    """What a statement assigns to `name` and nothing else."""
    if isinstance(statement, ast.AnnAssign):
        targets: list[ast.expr] = [statement.target]
    elif isinstance(statement, ast.Assign):
        targets = statement.targets
    else:
        return None
    return statement.value if [getattr(target, "id", None) for target in targets] == [name] else None
