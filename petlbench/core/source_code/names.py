"""Read modules from source: the names at the top of each, and the origin of each imported name."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import resolve_name
from typing import NamedTuple

from petlbench.core.source_code.files import place_of, read_module

CORE = "petlbench"
WHOLE = "*"  # stands for a name: the whole module with all that it defines
EFFECTS = "!"  # stands for a name: the effects of importing the module, beyond binding names
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES = (ast.If, ast.Try, ast.TryStar, ast.With, ast.For, ast.While, ast.Match)


class Definition(NamedTuple):
    """A name at the top of one of the project's modules."""

    module: str
    name: str


class Origin(NamedTuple):
    """The target of an import: a module, or a name in a module."""

    module: str
    name: str | None


Target = Definition | str  # a definition of the project, or the path of an external name: `torch.nn.Linear`


@dataclass
class Bound:
    """The names that some statements bind in their own scope, and the way in which they bind them."""

    names: set[str] = field(default_factory=set)  # bound by anything but an import
    origins: dict[str, set[Origin]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)  # imported modules, in their order
    stars: list[str] = field(default_factory=list)
    outer: set[str] = field(default_factory=set)  # declared nonlocal
    top: set[str] = field(default_factory=set)  # declared global

    def add(self, other: Bound) -> None:
        """Add the names that other statements of the scope bind."""
        self.names |= other.names
        self.outer |= other.outer
        self.top |= other.top
        self.modules += other.modules
        self.stars += other.stars
        for name, origins in other.origins.items():
            self.origins.setdefault(name, set()).update(origins)

    def origin(self, name: str) -> Origin | None:
        """Return the origin of a name that one import binds and nothing else; else None."""
        origins = self.origins.get(name, set())
        return next(iter(origins)) if len(origins) == 1 and name not in self.names | self.outer | self.top else None


@dataclass
class Module:
    """The statements at the top of a module, and their numbers by the names that they bind or change."""

    name: str
    package: str
    statements: list[ast.stmt] = field(default_factory=list)
    by_name: dict[str, list[int]] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)  # of names that one import binds
    acts: list[int] = field(default_factory=list)  # statements that do more than bind names
    bound: Bound = field(default_factory=Bound)
    compiled: str | None = None  # the digest of a file that is not Python source


def is_project(name: str, module: str) -> bool:
    """Return whether `name`, which `module` imports, is project code: in petlbench or in the package of `module`."""
    return name.partition(".")[0] in (CORE, module.partition(".")[0])


@cache
def module_of(name: str) -> Module | None:
    """Return the module, or None if it has no code. Raises UserError if its file is missing or not valid Python."""
    code = read_module(name)
    if code is None:
        return None
    place = place_of(name)
    package = name if place and place.folders is not None else name.rpartition(".")[0]
    if isinstance(code, bytes):
        return Module(name, package, compiled=hashlib.sha256(code).hexdigest())
    return _sorted_out(Module(name, package), code.body)


def _sorted_out(module: Module, body: list[ast.stmt]) -> Module:
    module.statements = list(running(body))
    bound = [bound_in([statement], module.package) for statement in module.statements]
    for here in bound:
        module.bound.add(here)
    for number, (statement, here) in enumerate(zip(module.statements, bound, strict=True)):
        changed = set(_changed(statement)) & module.bound.names
        for name in sorted(here.names | changed | here.origins.keys()):
            module.by_name.setdefault(name, []).append(number)
        if _acts(statement, changed, module):
            module.acts.append(number)
    for name in module.bound.origins:
        origin = module.bound.origin(name)
        plain = all(isinstance(module.statements[n], (ast.Import, ast.ImportFrom)) for n in module.by_name[name])
        if origin and plain:
            module.origins[name] = origin
            del module.by_name[name]
    return module


def running(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run on import.

    Leave out code for type checkers or for scripts alone, `pass` and docstrings.
    """
    for node in body:
        if (isinstance(node, ast.If) and _tail(node.test) == "TYPE_CHECKING") or (
            isinstance(node, ast.If) and _is_script(node.test)
        ):
            yield from running(node.orelse)
        elif not isinstance(node, ast.Pass) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            yield node


def _is_script(test: ast.expr) -> bool:
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Eq):
        return False
    sides = (test.left, *test.comparators)
    return {getattr(side, "id", getattr(side, "value", None)) for side in sides} == {"__name__", "__main__"}


def _tail(node: ast.AST) -> str | None:
    return getattr(node, "id", getattr(node, "attr", None))


def _root(node: ast.AST | None) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call, ast.Starred)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _flat(statement: ast.stmt) -> Iterator[ast.stmt]:
    """Yield a statement and the statements in its branches."""
    stack: list[ast.AST] = [statement]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.stmt):
            yield node
        if isinstance(node, (*BRANCHES, ast.ExceptHandler, ast.match_case)):
            stack.extend(
                child
                for child in ast.iter_child_nodes(node)
                if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case))
            )


def _changed(statement: ast.stmt) -> Iterator[str]:
    """Yield names whose values a statement changes in place: `X[...] = `, `X.append(...)`, `del X.a`, `X.a += `."""
    for node in _flat(statement):
        for target in _targets(node):
            if not isinstance(target, ast.Name) and (name := _root(target)):
                yield name
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if isinstance(node.value.func, ast.Attribute) and (name := _root(node.value.func)):
                yield name
            given = [*node.value.args, *(word.value for word in node.value.keywords)]  # `fill(TABLE)` changes it too
            yield from (value.id for value in given if isinstance(value, ast.Name))


def _targets(node: ast.stmt) -> Iterator[ast.expr]:
    """Yield each target that a statement assigns to or deletes."""
    stack = list(getattr(node, "targets", [getattr(node, "target", None)]))
    while stack:
        target = stack.pop()
        if isinstance(target, (ast.Tuple, ast.List)):
            stack.extend(target.elts)
        elif target is not None:
            yield target


def _acts(statement: ast.stmt, changed: set[str], module: Module) -> bool:
    """Return whether a statement does more than bind names or change a value that this module made and named."""
    for node in _flat(statement):
        if isinstance(node, (ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Assert, ast.Raise)):
            return True
        if isinstance(node, ast.Expr):
            owner = _root(node.value.func) if isinstance(node.value, ast.Call) else None
            if not isinstance(getattr(node.value, "func", None), ast.Attribute) or owner not in changed:
                return True
            if _is_alias(owner, module):
                return True
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
            targets = list(_targets(node))
            roots = {_root(target) for target in targets if isinstance(target, (ast.Attribute, ast.Subscript))}
            if any(root not in changed or _is_alias(root, module) for root in roots):
                return True
            if any(isinstance(target, ast.Name) and target.id == "_" for target in targets):
                return True
    return False


def _is_alias(name: str | None, module: Module) -> bool:
    """Return whether a name may refer to a value that was made elsewhere."""
    for statement in module.statements:
        for node in _flat(statement):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, (ast.Name, ast.Attribute, ast.Subscript)):
                continue
            if any(_tail(target) == name for target in node.targets):
                return True
    return name in module.bound.origins


def bound_in(body: Sequence[ast.AST], package: str) -> Bound:
    """Return the names that `body` binds in its own scope, without those inside functions, classes, comprehensions."""
    found = Bound()
    stack: list[tuple[ast.AST, bool]] = [(node, False) for node in reversed(body)]
    while stack:
        node, inside = stack.pop()  # inside a comprehension: its targets are local, except for `:=`
        if isinstance(node, ast.NamedExpr):
            found.names.add(node.target.id)
            stack.append((node.value, inside))
            continue
        if not inside:
            _bind(node, found, package)
        if isinstance(node, ast.If) and _tail(node.test) == "TYPE_CHECKING":
            children: Iterable[ast.AST] = node.orelse
        elif isinstance(node, FUNCTIONS):
            children = [*node.args.defaults, *filter(None, node.args.kw_defaults), *getattr(node, "decorator_list", [])]
        elif isinstance(node, ast.ClassDef):
            children = [*node.bases, *node.keywords, *node.decorator_list]
        else:
            children = list(ast.iter_child_nodes(node))
        within = inside or isinstance(node, COMPREHENSIONS)
        stack.extend((child, within) for child in reversed(list(children)))
    return found


def _bind(node: ast.AST, found: Bound, package: str) -> None:
    if isinstance(node, ast.Name):
        if not isinstance(node.ctx, ast.Load):
            found.names.add(node.id)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for name, origin, module in imports(node, package):
            found.modules.append(module)
            if name == WHOLE:
                found.stars.append(module)
            else:
                found.origins.setdefault(name, set()).add(origin)
    elif isinstance(node, (ast.Global, ast.Nonlocal)):
        (found.top if isinstance(node, ast.Global) else found.outer).update(node.names)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        found.names.add(node.name)
    elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
        found.names.update([node.name] if node.name else [])
    elif isinstance(node, ast.MatchMapping):
        found.names.update([node.rest] if node.rest else [])


def imports(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, Origin, str]]:
    """Yield for each alias the bound name, its origin and the imported module; none for imports that must fail."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name.partition(".")[0]
            yield alias.asname or top, Origin(alias.name if alias.asname else top, None), alias.name
        return
    try:
        base = resolve_name("." * node.level + (node.module or ""), package)
    except ImportError:  # a relative import beyond the top package: it fails at run time too
        return
    for alias in node.names:
        yield alias.asname or alias.name, Origin(base, alias.name), base


def followed(target: Target, attributes: Sequence[str]) -> tuple[Target, Sequence[str]]:
    """Follow `target.a.b` through modules; return the target reached and the attributes that are left."""
    left = list(attributes)
    while left:
        if isinstance(target, str):
            return ".".join([target, *left]), []
        if target.name != WHOLE:
            break
        target = member(target.module, left.pop(0))
    return target, left


def origin_of(origin: Origin, module: str) -> Target:
    """Return the target that an import in `module` refers to."""
    path = origin.module if origin.name is None else f"{origin.module}.{origin.name}"
    if not is_project(origin.module, module):
        return path
    if place_of(origin.module) is None:
        return f"?{path}"
    whole = Definition(origin.module, WHOLE)
    return whole if origin.name is None else member(origin.module, origin.name)


def member(module: str, name: str) -> Target:
    """Return the target of a name in a project module; follow imports and packages to where it is defined.

    A name that the source does not bind may be made at run time: then it stands for the whole module.
    """
    target = bound_target(module, name)
    if target is None and module_of(module) and not name.startswith("__"):
        return Definition(module, name)
    return target or f"?{name}"


def bound_target(module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Target | None:
    """Return the target of a name that a module binds, directly or by a star import; None if it binds no such name."""
    source = module_of(module)
    if source and (source.compiled or name in source.by_name):
        return Definition(module, name)
    if (module, name) in seen:
        return None
    seen |= {(module, name)}
    if source and name in source.origins:
        origin = source.origins[name]
        if origin.name is None or not is_project(origin.module, module) or place_of(origin.module) is None:
            return origin_of(origin, module)
        return bound_target(origin.module, origin.name, seen) or member(origin.module, origin.name)
    if place_of(f"{module}.{name}") is not None:
        return Definition(f"{module}.{name}", WHOLE)
    for star in reversed(source.bound.stars if source else []):
        if not is_project(star, module):
            return f"{star}.*.{name}"
        if target := bound_target(star, name, seen):
            return target
    return None
