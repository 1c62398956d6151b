"""Resolve names inside a definition to their scopes, and find the base classes of a class."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from petlbench.core.source_code.names import (
    Bound,
    Definition,
    Module,
    Target,
    bound_target,
    followed,
    module_of,
    origin_of,
)

# Base classes that call no private method of a subclass, except HOOKS.
PLAIN = frozenset(
    ["object", "abc.ABC", "typing.Protocol", "typing.Generic", "torch.nn.Module", "Exception", "ValueError"]
)
HOOKS = frozenset(
    [
        "_apply",
        "_buffers",
        "_call_impl",
        "_extra_repr",
        "_get_name",
        "_load_from_state_dict",
        "_modules",
        "_named_members",
        "_parameters",
        "_save_to_state_dict",
        "_version",
        "_slow_forward",
        "_replicate_for_data_parallel",
        "_wrapped_call_impl",
    ]
)
DECORATORS = frozenset(  # decorators that neither read annotations nor register the definition
    [
        "property",
        "classmethod",
        "staticmethod",
        "dataclasses.dataclass",
        "functools.cache",
        "functools.lru_cache",
        "functools.wraps",
        "functools.cached_property",
        "functools.total_ordering",
        "contextlib.contextmanager",
        "abc.abstractmethod",
        "typing.overload",
        "typing.final",
        "typing.runtime_checkable",
        "torch.no_grad",
        "torch.enable_grad",
        "torch.inference_mode",
        "pydantic.model_validator",
        "pydantic.field_validator",
    ]
)


@dataclass(eq=False)
class Scope:
    """A scope for looking up names: a module, a class or a function (a comprehension counts as a function)."""

    module: Module
    kind: Literal["module", "class", "function"] = "module"
    parent: Scope | None = None
    bound: Bound = field(default_factory=Bound)
    own: str | None = None  # the name of `self`, in a method of a class whose bases are known
    silent: frozenset[str] = frozenset()  # names of texts that only errors quote

    def find(self, name: str) -> Scope | Target:
        """Return the function or class scope that a name is local to; else the target that it refers to."""
        here: Scope | None = self
        while here is not None and here.kind != "module":
            if name in here.bound.top:
                break
            if (here.kind == "function" or here is self) and name not in here.bound.outer:
                if origin := here.bound.origin(name):
                    return origin_of(origin, self.module.name)
                if name in here.bound.names or name in here.bound.origins:
                    return here
            here = here.parent
        return at_top(name, self.module)

    def path(self, node: ast.AST) -> tuple[Scope | Target, Sequence[str]]:
        """Return the target of a name with attributes, and the attributes left; LookupError for other expressions."""
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            raise LookupError
        found = self.find(node.id)
        if isinstance(found, Scope) or (isinstance(found, str) and found.startswith("builtins.")):
            return found, attributes
        return followed(found, attributes)

    def outside(self, node: ast.AST) -> str:
        """Return the path of an external name, such as `torch.nn.Linear` or `builtins.print`; empty for all else."""
        try:
            found, left = self.path(node)
        except LookupError:
            return ""
        return ".".join([found, *left]) if isinstance(found, str) else ""


def at_top(name: str, module: Module) -> Target:
    """Return the target of a name at the top of a module: one that it binds, or a builtin."""
    if name in module.by_name:
        return Definition(module.name, name)
    if name in module.origins:
        return origin_of(module.origins[name], module.name)
    return (bound_target(module.name, name) if module.bound.stars else None) or f"builtins.{name}"


def bases(node: ast.ClassDef, scope: Scope) -> Iterator[Target]:
    """Yield the base classes of a class; an empty text for a base that is not a known name."""
    for base in node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        try:
            found, left = scope.path(plain)
        except LookupError:
            yield ""
            continue
        if isinstance(found, Scope) or (left and not isinstance(found, str)):
            yield ""
        else:
            yield found.removeprefix("builtins.") if isinstance(found, str) else found


@cache
def ancestors(definition: Definition) -> frozenset[Target]:
    """Return a class and all its ancestors; an empty text stands for an unknown one."""
    found: set[Target] = set()
    waiting: list[Target] = [definition]
    while waiting:
        target = waiting.pop()
        if target in found:
            continue
        found.add(target)
        if isinstance(target, Definition):
            classes = classes_of(target)
            waiting.extend([""] if not classes else [])
            for node, scope in classes:
                waiting.extend(bases(node, scope))
    return frozenset(found)


def classes_of(definition: Definition) -> list[tuple[ast.ClassDef, Scope]]:
    """Return the class statements that bind a name at the top of a module; empty if it is not a class."""
    module = module_of(definition.module)
    if module is None or definition.name not in module.by_name:
        return []
    statements = [module.statements[number] for number in module.by_name[definition.name]]
    found = [node for node in statements if isinstance(node, ast.ClassDef) and node.name == definition.name]
    return [(node, Scope(module)) for node in found]


def all_ancestors(node: ast.ClassDef, scope: Scope) -> frozenset[Target]:
    """Return the ancestors of a class whose statement may stand in any scope; see `ancestors`."""
    found: set[Target] = set()
    if scope.kind == "module":
        found.add(Definition(scope.module.name, node.name))
    for base in bases(node, scope):
        found |= ancestors(base) if isinstance(base, Definition) else {base}
    return frozenset(found)


def is_plain(kinds: frozenset[Target]) -> bool:
    """Return whether no ancestor may call private methods of a subclass by names that the project does not know."""
    return all(isinstance(kind, Definition) or kind in PLAIN for kind in kinds)


def is_known(decorator: ast.expr, scope: Scope) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    if isinstance(called, ast.Attribute) and called.attr in ("setter", "getter", "deleter"):
        return True
    return scope.outside(called).removeprefix("builtins.") in DECORATORS


def parsed_annotation(node: ast.AnnAssign) -> ast.AnnAssign:
    """Return the statement with an annotation in quotes, such as `"Name"`, parsed to the name."""
    try:
        annotation = ast.parse(str(getattr(node.annotation, "value", "")), mode="eval").body
    except SyntaxError:
        return node
    return ast.AnnAssign(node.target, annotation, node.value, node.simple)


def named_by(node: ast.stmt) -> list[str]:
    """Return the names that a statement in a class body binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
