"""Code that the digest leaves out because no number depends on it: presentation of results, and error texts."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

from petlbench.core.source_code.names import Definition, Target, module_of
from petlbench.core.source_code.scopes import Scope, ancestors

# Code that presents or identifies results and computes none: `module`, `module:name` or `module:Class.member` (in
# subclasses too). Never list code that computes: records would stay fresh when it changes.
SILENT: Mapping[str, str] = {
    "petlbench.core.drawing": "draws for people",
    "petlbench.api.task:Task.picture": "draws for people",
    "petlbench.core.units:human_bytes": "writes numbers for people",
    "petlbench.core.units:human_count": "writes numbers for people",
    "petlbench.core.units:human_seconds": "writes numbers for people",
    "petlbench.core.units:score_text": "writes numbers for people",
    "petlbench.core.messages:did_you_mean": "writes an error's text",
    "petlbench.core.messages:one_line": "writes an error's text",
    "petlbench.api.source:Source.origin": "says where to get files",
    "petlbench.api.method:Method.about": "describes a paper",
    "petlbench.pipeline.fingerprint": "says what a result depends on, and has no part in it",
    "petlbench.core.source_code.closure": "says what a result depends on, and has no part in it",
}
ERROR = "petlbench.core.errors:UserError"  # of a subclass, its bases count and its members other than SPEECH
SPEECH = ("__init__", "__str__", "__repr__")
SPOKEN = ("builtins.print", "warnings.warn", "logging.")  # calls whose arguments only people read
TELLING = ("debug", "info", "warning", "error", "exception", "critical", "log")  # methods of loggers
CARRIERS = (
    "StopIteration",
    "StopAsyncIteration",
    "SystemExit",
    "GeneratorExit",
)  # their argument is a value
FIELD = ("pydantic.Field", "pydantic.fields.Field", "dataclasses.field")
FIELD_TEXTS = ("description", "title", "examples")
# Calls that may stand in a text that only errors quote, because none of them changes anything.
HARMLESS = frozenset(
    [
        "len",
        "str",
        "repr",
        "ascii",
        "sorted",
        "map",
        "min",
        "max",
        "sum",
        "type",
        "set",
        "list",
        "tuple",
        "dict",
        "round",
        "abs",
        "join",
        "split",
        "format",
        "strip",
        "removesuffix",
        "removeprefix",
        "replace",
        "lower",
        "upper",
        "keys",
        "values",
        "items",
        "get",
        "absolute",
        "rpartition",
        "partition",
        "title",
    ]
)


def is_silent(target: Target) -> bool:
    """Return whether a definition only presents results."""
    return isinstance(target, Definition) and (target.module in SILENT or f"{target.module}:{target.name}" in SILENT)


def silent_members(kinds: frozenset[Target]) -> frozenset[str]:
    """Return the members that only present results, in a class with these ancestors."""
    paths = {f"{kind.module}:{kind.name}" for kind in kinds if isinstance(kind, Definition)}
    return frozenset(name.rpartition(".")[2] for name in SILENT if ":" in name and name.rpartition(".")[0] in paths)


def is_error(kinds: frozenset[Target]) -> bool:
    """Return whether a class with these ancestors is a UserError."""
    return Definition(*ERROR.split(":")) in kinds


def unspoken(node: ast.AST, scope: Scope) -> list[ast.AST]:
    """Return the parts of a node that only people read: texts of errors and prints, descriptions of options."""
    if isinstance(node, ast.Assert):
        return [node.msg] if node.msg else []
    if isinstance(node, ast.Raise):
        return [*([node.cause] if node.cause else []), *_spoken_arguments(node.exc, scope)]
    if not isinstance(node, ast.Call):
        return []
    called = scope.outside(node.func)
    if called in FIELD:
        return [word for word in node.keywords if word.arg in FIELD_TEXTS]
    if called in SPOKEN[:2] or (called.startswith(SPOKEN[2]) and called.rpartition(".")[2] in TELLING):
        return [*node.args, *node.keywords]
    return [*node.args, *node.keywords] if _is_logger(node.func, scope) else []


def _spoken_arguments(error: ast.expr | None, scope: Scope) -> list[ast.AST]:
    """Return the arguments of an exception that only people read.

    They are all arguments of builtin exceptions and UserError; of others only texts, because the rest may be values.
    """
    if not isinstance(error, ast.Call):
        return []
    given: list[ast.AST] = [*error.args, *error.keywords]
    try:
        found, left = scope.path(error.func)
    except LookupError:
        return []
    name = found.removeprefix("builtins.") if isinstance(found, str) else ""
    if isinstance(found, Definition) and not left and is_error(ancestors(found)):
        return given
    if isinstance(found, str) and found.startswith("builtins.") and name not in CARRIERS and not left:
        return given
    return [value for value in given if is_text(value.value if isinstance(value, ast.keyword) else value)]


def _is_logger(called: ast.AST, scope: Scope) -> bool:
    """Return whether a call is `log.warning` or so, with `log = logging.getLogger(...)` at the top of the module."""
    if not (isinstance(called, ast.Attribute) and called.attr in TELLING and isinstance(called.value, ast.Name)):
        return False
    found = scope.find(called.value.id)
    if not isinstance(found, Definition) or (module := module_of(found.module)) is None:
        return False
    made = [module.statements[number] for number in module.by_name.get(found.name, [])]
    return bool(made) and all(
        isinstance(one, ast.Assign)
        and isinstance(one.value, ast.Call)
        and Scope(module).outside(one.value.func) == "logging.getLogger"
        for one in made
    )


def is_text(node: ast.AST | None) -> bool:
    """Return whether an expression is a text that is built without side effects."""
    for part in ast.walk(node) if node else ():
        if isinstance(part, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)):
            return False
        if isinstance(part, ast.Call) and getattr(part.func, "id", getattr(part.func, "attr", "")) not in HARMLESS:
            return False
    return _makes_text(node)


def _makes_text(node: ast.AST | None) -> bool:
    if isinstance(node, ast.IfExp):
        return _makes_text(node.body) and _makes_text(node.orelse)
    while isinstance(node, (ast.BinOp, ast.Call, ast.Attribute)):
        node = node.left if isinstance(node, ast.BinOp) else node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def quoted_only(body: Sequence[ast.stmt], scope: Scope) -> frozenset[str]:
    """Return the local names of a function that hold a text which only errors and prints use."""
    nodes = [node for statement in body for node in ast.walk(statement)]
    if not any(isinstance(node, ast.Raise) for node in nodes):
        return frozenset()
    texts = {name for node in nodes if (name := text_name(node))}
    stores = [node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
    given = [text_name(node) for node in nodes]
    texts = {name for name in texts if stores.count(name) == given.count(name)}
    while texts:
        used = set(_used(body, scope, texts))
        if not used & texts:
            break
        texts -= used
    return frozenset(texts)


def text_name(node: ast.AST) -> str | None:
    """Return the name if the statement assigns a text to one name and does nothing else; else None."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and is_text(node.value):
        return getattr(node.targets[0], "id", None)
    return None


def _used(body: Sequence[ast.stmt], scope: Scope, texts: set[str]) -> Iterator[str]:
    stack: list[ast.AST] = list(body)
    gone: set[int] = set()
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        if text_name(node) in texts:
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from (part.id for part in ast.walk(node) if isinstance(part, ast.Name))
            continue
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield from node.names
        gone |= {id(part) for part in unspoken(node, scope)}
        stack.extend(child for child in ast.iter_child_nodes(node) if id(child) not in gone)
