"""Write a definition as text that depends on what it computes, and not on its place or its local names.

Local names become ordinals. Three kinds of names stay open for the closure to resolve: the project's definitions,
private attributes, and parameters, whose names count only if something passes them by name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from importlib.util import resolve_name
from typing import Any

from petlbench.core.source_code.files import place_of
from petlbench.core.source_code.names import (
    COMPREHENSIONS,
    FUNCTIONS,
    WHOLE,
    Bound,
    Definition,
    Module,
    Target,
    bound_in,
    imports,
    is_project,
    origin_of,
    running,
)
from petlbench.core.source_code.scopes import (
    HOOKS,
    Scope,
    all_ancestors,
    is_known,
    is_plain,
    named_by,
    parsed_annotation,
)
from petlbench.core.source_code.silence import (
    SPEECH,
    is_error,
    quoted_only,
    silent_members,
    text_name,
    unspoken,
)
from petlbench.core.source_code.tokens import Given, Parameter, Private, Text, Token, silenced

LOOKS_AROUND = ("globals", "locals", "eval", "exec")  # these may use any name of the module, and local names
OF_HERE = ("builtins.vars", "builtins.dir")  # the same, if called without arguments
PRIVATE = re.compile(r"\b_[A-Za-z]\w*")
SECRET = re.compile(r"_[A-Za-z](\w*[^_\W])?")
IMPORTERS = ("importlib.import_module", "builtins.__import__")


class Writer:
    """Write one statement. It uses a stack, because long sums nest deeper than Python recurses."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.text = Text()
        self.numbers: dict[tuple[Scope, str], int] = {}
        self.gone: set[int] = set()  # ids of nodes that are left out
        self.literal = False  # keep local names
        self.kinds: dict[Scope, frozenset[Target]] = {}  # of class scopes: what the class is derived from

    def written(self, statement: ast.stmt) -> Text:
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        self.literal = not names.isdisjoint(LOOKS_AROUND)
        stack: list[Any] = [(statement, Scope(self.module))]
        tokens: list[Token] = []
        while stack:
            item = stack.pop()
            if isinstance(item, (str, Definition, Parameter, Private)):
                tokens.append(item)
            else:
                stack.extend(reversed(self._parts(*item)))
        for token in tokens:
            if isinstance(token, str) and self.text.tokens and isinstance(self.text.tokens[-1], str):
                self.text.tokens[-1] += token
            else:
                self.text.tokens.append(token)
        return self.text

    def _parts(self, node: ast.AST, scope: Scope) -> list[Any]:
        """Return the parts of a node: tokens, and nodes with the scope to write them in."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._name(node, scope)
        if isinstance(node, FUNCTIONS):
            return self._function(node, scope)
        if isinstance(node, ast.ClassDef):
            return self._class(node, scope)
        if isinstance(node, COMPREHENSIONS):
            return self._comprehension(node, scope)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return self._import(node, scope)
        if isinstance(node, ast.AnnAssign) and scope.kind != "class":
            return ["Assign(targets=[", (node.target, scope), ",]value=", *self._value(node.value, scope), ")"]
        if isinstance(node, ast.Constant):
            self._note_text(node.value)
        if isinstance(node, ast.keyword) and node.arg:
            self.text.words.add(node.arg)
        if isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Constant):
            node = parsed_annotation(node)
        if isinstance(node, ast.Call) and scope.outside(node.func) in IMPORTERS:
            return [*self._plain(node, scope), *self._imported_by_name(node)]
        if isinstance(node, ast.Call) and not node.args and scope.outside(node.func) in OF_HERE:
            return [*self._plain(node, scope), Definition(self.module.name, WHOLE)]
        return self._plain(node, scope)

    def _imported_by_name(self, node: ast.Call) -> list[Any]:
        name = getattr(node.args[0], "value", None) if node.args else None
        try:
            name = resolve_name(name, self.module.package) if isinstance(name, str) else ""
        except ImportError:
            return []
        return [Definition(name, WHOLE)] if name and is_project(name, self.module.name) and place_of(name) else []

    def _plain(self, node: ast.AST, scope: Scope) -> list[Any]:
        """Return the type of a node and its fields that are not empty.

        The result is equal in every Python version. `ast.dump` prints empty fields in some versions, and new versions
        add fields; `ast.unparse` changes its quoting; the tokenizer splits f-strings differently and keeps formatting.
        """
        self.gone |= {id(part) for part in unspoken(node, scope)}
        parts: list[Any] = [f"{type(node).__name__}("]
        for name in sorted(set(node._fields) - {"kind", "ctx", "type_comment"}):  # kind: the u of u"text"
            value = getattr(node, name, None)
            if isinstance(node, ast.JoinedStr) and value:  # Python 3.12 leaves empty pieces around some replacements
                value = [piece for piece in value if getattr(piece, "value", None) != ""]
            if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar, ast.MatchMapping)) and value:
                value = Given(self._token(value, scope)) if name in ("name", "rest") else value
            if id(value) in self.gone:
                continue
            written = self._value(value, scope) if value is not None else []
            if written:
                parts += [f"{name}=", *written]
        return [*parts, ")"]

    def _value(self, value: Any, scope: Scope) -> list[Any]:
        if isinstance(value, Given):
            return [value.token]
        if isinstance(value, ast.AST):
            return [(value, scope)]
        if isinstance(value, list):
            kept = [one for one in value if id(one) not in self.gone]
            if kept and all(isinstance(one, ast.stmt) for one in kept):
                return self._body(kept, scope)
            return ["[", *(part for one in kept for part in [*self._value(one, scope), ","]), "]"] if kept else []
        return [ascii(value)]  # in ASCII, because new Unicode versions make more characters printable

    def _body(self, body: Iterable[ast.stmt], scope: Scope) -> list[Any]:
        kept = [(node, scope) for node in running(body) if not self._is_mute(node, scope)]
        return ["[", *kept, "]"] if kept else []

    def _is_mute(self, node: ast.stmt, scope: Scope) -> bool:
        """Return whether a statement has no effect: a declaration, or a text that only errors quote."""
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            return True
        if isinstance(node, ast.AnnAssign) and node.value is None:
            return scope.kind != "class"
        return scope.kind == "function" and text_name(node) in scope.silent

    def _token(self, name: str, scope: Scope) -> Token:
        """Return the token of a name that is not part of an expression."""
        found = scope.find(name)
        if isinstance(found, Scope):
            return self._local(name, found)
        if isinstance(found, str) and found.removeprefix("builtins.") in LOOKS_AROUND:
            return Definition(self.module.name, WHOLE)
        return silenced(found)

    def _local(self, name: str, scope: Scope) -> Token:
        if scope.kind == "class":
            return self._attribute(name)
        if self.literal:
            return f"{name} "
        return f"~{self.numbers.setdefault((scope, name), len(self.numbers))} "

    def _attribute(self, name: str) -> Token:
        return Private(name) if SECRET.fullmatch(name) else f"{name} "

    def _name(self, node: ast.Name | ast.Attribute, scope: Scope) -> list[Any]:
        """Return the parts of a name or an attribute; an imported name becomes its target."""
        try:
            found, left = scope.path(node)
        except LookupError:  # attributes of no name
            assert isinstance(node, ast.Attribute)
            around = [Definition(self.module.name, WHOLE)] if node.attr == "__subclasses__" else []
            return ["Attribute(", (node.value, scope), ".", self._attribute(node.attr), *around, ")"]
        if isinstance(node, ast.Attribute) and isinstance(found, Scope):
            self._define(node, found)
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        assert isinstance(root, ast.Name)
        head = self._heads(root, found, scope)
        if "__subclasses__" in left or found == "sys.modules":
            head.append(Definition(self.module.name, WHOLE))
        for attribute in left:
            head = ["Attribute(", *head, ".", self._attribute(attribute), ")"]
        return head

    def _heads(self, node: ast.Name, found: Scope | Target, scope: Scope) -> list[Any]:
        if isinstance(found, Scope):
            here: list[Any] = [self._local(node.id, found), ";"]
            if found.kind == "class" and isinstance(node.ctx, ast.Load):  # unbound so far: outer
                above = (found.parent or scope).find(node.id)
                here += [above] if isinstance(above, Definition) else []
            return here
        if isinstance(found, str):
            around = found.removeprefix("builtins.") in LOOKS_AROUND
            return [f"{found};", *([Definition(self.module.name, WHOLE)] if around else [])]
        return [silenced(found), ";"]

    def _define(self, node: ast.Attribute, owner: Scope) -> None:
        """Note private attributes that a method sets on its own object."""
        own = isinstance(node.value, ast.Name) and owner.own == node.value.id
        if own and isinstance(node.ctx, ast.Store) and SECRET.fullmatch(node.attr):
            self.text.hidden.add(node.attr)

    def _note_text(self, value: Any) -> None:
        if isinstance(value, str):
            self.text.open.update(PRIVATE.findall(value))
            self.text.words.update([value] if value.isidentifier() else [])

    def _import(self, node: ast.Import | ast.ImportFrom, scope: Scope) -> list[Any]:
        """Return nothing if each name always means its import; else which import each name may mean."""
        parts: list[Any] = []
        for name, origin, module in imports(node, self.module.package):
            if is_project(module, self.module.name):
                self.text.imported += [module, *([f"{origin.module}.{origin.name}"] if origin.name else [])]
            found = scope.find(name)
            target = silenced(origin_of(origin, self.module.name))
            if scope.kind == "class":
                parts += ["import(", self._attribute(name), "=", target, ")"]
            elif name != WHOLE and (isinstance(found, Scope) or found == Definition(self.module.name, name)):
                parts += ["import(", self._token(name, scope), "=", target, ")"]
        return parts

    def _comprehension(self, node: Any, scope: Scope) -> list[Any]:
        """Return the parts of a comprehension: its targets are local, its first iterable belongs to the outer scope."""
        names = Bound()
        for loop in node.generators:
            names.names |= bound_in([loop.target], self.module.package).names
        inner = Scope(self.module, "function", scope, names)
        parts: list[Any] = [f"{type(node).__name__}("]
        for place, loop in enumerate(node.generators):
            source = (loop.iter, scope if place == 0 else inner)
            conditions = [part for test in loop.ifs for part in (" if ", (test, inner))]
            parts += [" async" if loop.is_async else "", " for ", (loop.target, inner), " in ", source, *conditions]
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        return [*parts, ":", *(part for result in results for part in ((result, inner), ",")), ")"]

    def _class(self, node: ast.ClassDef, scope: Scope) -> list[Any]:
        kinds = all_ancestors(node, scope)
        silent, error = silent_members(kinds), is_error(kinds)
        dropped = {*silent, *(SPEECH if error else ())}
        body = [one for one in node.body if not dropped.intersection(named_by(one))]
        inner = Scope(self.module, "class", scope, bound_in(list(running(body)), self.module.package))
        self.kinds[inner] = kinds
        private = {name for one in body for name in named_by(one) if SECRET.fullmatch(name)}
        (self.text.hidden if is_plain(kinds) else self.text.open).update(private)
        self.text.open.update(private & HOOKS)
        decorators = [part for one in node.decorator_list for part in ("@", (one, scope))]
        above = [part for one in [*node.bases, *node.keywords] for part in ((one, scope), ",")]
        return ["class ", *decorators, self._token(node.name, scope), "(", *above, ")", *self._body(body, inner)]

    def _function(self, node: Any, scope: Scope) -> list[Any]:
        """Return the parts of a function; decorators and defaults belong to the outer scope. See `_parameters`."""
        lone = isinstance(node, ast.Lambda)
        body = [node.body] if lone else list(running(node.body))
        inner = Scope(self.module, "function", scope, bound_in(body, self.module.package))
        arguments = node.args
        listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        listed += [one for one in (arguments.vararg, arguments.kwarg) if one]
        inner.bound.names.update(one.arg for one in listed)
        decorators = [] if lone else node.decorator_list
        kind = type(node).__name__
        parts: list[Any] = [f"{kind}", *(part for one in decorators for part in ("@", (one, scope)))]
        first = next(iter([*arguments.posonlyargs, *arguments.args]), None)
        if scope.kind == "class" and first is not None and is_plain(self.kinds[scope]):
            inner.own = first.arg
        if not lone:
            inner.silent = quoted_only(body, inner)
            parts += [self._token(node.name, scope)]
        parts += ["(", *self._parameters(node, scope, inner), ")"]
        if not all(is_known(one, scope) for one in decorators):
            hints = [*(one.annotation for one in listed), node.returns]
            parts += [part for hint in hints for part in ("->", *self._value(hint, scope))]
        return [*parts, *([(node.body, inner)] if lone else self._body(body, inner))]

    def _parameters(self, node: Any, scope: Scope, inner: Scope) -> list[Any]:
        """Return the parts of the parameters; the name of some counts.

        Names of public methods' parameters and of keyword-only ones count; other names count if something in the
        closure passes an argument of that name. The name of `self` never counts.
        """
        given = node.args
        method = scope.kind == "class"
        static = any(scope.outside(one) == "builtins.staticmethod" for one in getattr(node, "decorator_list", []))
        known = method and not SECRET.fullmatch(getattr(node, "name", ""))
        parts: list[Any] = []
        placed = [*given.posonlyargs, *given.args]
        defaults = [None] * (len(placed) - len(given.defaults)) + list(given.defaults)
        for place, (one, default) in enumerate(zip(placed, defaults, strict=True)):
            ordinal = str(self._local(one.arg, inner))
            if place < len(given.posonlyargs):
                parts += ["/", ordinal]
            elif method and place == 0 and not static:
                parts += [ordinal]
            else:
                parts += [f"{one.arg} {ordinal}" if known else Parameter(one.arg, ordinal)]
            parts += ["=", (default, scope), ","] if default is not None else [","]
        parts += ["*", str(self._local(given.vararg.arg, inner))] if given.vararg else []
        for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
            parts += [f"*{one.arg} ", str(self._local(one.arg, inner))]
            parts += ["=", (default, scope), ","] if default is not None else [","]
        return [*parts, *(["**", str(self._local(given.kwarg.arg, inner))] if given.kwarg else [])]
