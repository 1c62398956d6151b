"""Code fingerprints: a digest of all that a definition computes with, read off its source.

From a class or a function, names lead to the definitions of the project that it uses, and so on. These are numbered in
the order in which they are come by, so that neither files nor names of definitions count. Two names for attributes that
start with an underscore are told apart by the order in which they occur, where only the project knows them.
"""

from __future__ import annotations

import ast
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from petlbench.core.errors import UserError
from petlbench.core.source_code.files import place_of
from petlbench.core.source_code.names import EFFECTS, WHOLE, Definition, is_project, member, module_of
from petlbench.core.source_code.scopes import Scope, all_ancestors, at_top, is_known
from petlbench.core.source_code.text import Writer
from petlbench.core.source_code.tokens import Parameter, Private, Text, Token, silenced

DIGITS = 16


@dataclass(frozen=True)
class Closure:
    """All that a definition computes with: the definitions, in the order in which they are come by; and its digest."""

    definitions: tuple[Definition, ...]
    digest: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{module}:{name}" for module, name in self.definitions)

    @property
    def modules(self) -> frozenset[str]:
        return frozenset(definition.module for definition in self.definitions)


def closure(start: str) -> Closure:
    """What `module:Attr`, or all of `module`, computes with, within petlbench and its own top-level package.

    Every file is read once per process. Raises UserError for a module without a file, and for one that cannot be read.
    """
    path, _, attribute = start.partition("[")[0].partition(":")
    module, name = path.strip(), attribute.strip().partition(".")[0]
    if module_of(module) is None:
        raise UserError(f"module {module}, which an entry point names, has no file: mend or reinstall its distribution")
    target = member(module, name) if name else Definition(module, WHOLE)
    return of(target if isinstance(target, Definition) else Definition(module, WHOLE))


def closure_of(kind: type) -> Closure | None:
    """What a class computes with; None for one whose code is in no file, as in a notebook or a script."""
    if kind.__module__ == "__main__" or module_of(kind.__module__) is None:
        return None
    return closure(f"{kind.__module__}:{kind.__qualname__}")


@cache
def of(start: Definition) -> Closure:
    """What a definition computes with."""
    walk = _Walk()
    walk.visit(start)
    while walk.waiting:
        walk.read(walk.waiting.popleft())
    return Closure(tuple(walk.texts), digest_of(walk.written()))


def digest_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGITS]


class _Walk:
    """From definition to definition, those that are named first first."""

    def __init__(self) -> None:
        self.numbers: dict[Definition, int] = {}
        self.waiting: deque[Definition] = deque()
        self.texts: dict[Definition, Text] = {}
        self.entered: set[str] = set()

    def visit(self, definition: Definition) -> None:
        if definition not in self.numbers:
            self.numbers[definition] = len(self.numbers)
            self.waiting.append(definition)
            self.enter([definition.module])

    def enter(self, modules: Iterable[str]) -> None:
        """What a module, the packages above it and the modules that it imports do when they are imported counts."""
        stack = list(modules)
        while stack:
            name = stack.pop()
            if name in self.entered:
                continue
            self.entered.add(name)
            if above := name.rpartition(".")[0]:
                stack.append(above)
            if module := module_of(name):
                if acts_of(name):
                    self.visit(Definition(name, EFFECTS))
                stack.extend(_imported(name, tuple(module.bound.modules)))

    def read(self, definition: Definition) -> None:
        text = self.texts[definition] = text_of(definition)
        for token in text.tokens:
            if isinstance(token, Definition):
                self.visit(token)
        self.enter(one for one in text.imported if is_project(one, definition.module) and place_of(one))

    def written(self) -> Iterator[str]:
        """The text of each, with what is open filled in."""
        texts = self.texts.values()
        words = set().union(*(text.words for text in texts))
        hidden = set().union(*(text.hidden for text in texts)) - words
        opened = set().union(*(text.open for text in texts))
        begun = tuple(name for name in opened if name.endswith("_"))  # `getattr(self, f"_read_{part}")`
        hidden = {name for name in hidden if name not in opened and not name.startswith(begun)}
        order: dict[str, int] = {}

        def said(token: Token) -> str:
            if isinstance(token, Definition):
                return f"#{self.numbers[token]}"
            if isinstance(token, Parameter):
                return f"{token.name} {token.ordinal}" if token.name in words else token.ordinal
            if isinstance(token, Private):
                return f"_{order.setdefault(token.name, len(order))} " if token.name in hidden else f"{token.name} "
            return token

        for number, text in enumerate(texts):
            yield f"#{number}: " + "".join(map(said, text.tokens))


@cache
def _imported(name: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    """The project's modules that importing `name` imports: of `from a import b` both `a` and `a.b`, if it is one."""
    module = module_of(name)
    assert module is not None
    froms = [f"{one.module}.{one.name}" for ones in module.bound.origins.values() for one in ones if one.name]
    return tuple(one for one in dict.fromkeys([*modules, *froms]) if is_project(one, name) and place_of(one))


@cache
def text_of(definition: Definition) -> Text:
    """Everything at the top of its module that a name is bound or changed by."""
    module = module_of(definition.module)
    text = Text()
    if module is None:
        return text
    if module.compiled:
        named: list[Token] = [f"{definition.name} of ", Definition(module.name, WHOLE)]
        text.tokens = [module.compiled] if definition.name == WHOLE else named
    elif definition.name == WHOLE:
        for name in sorted({*module.by_name, *module.origins}):
            text.tokens += [f" {name}=", silenced(at_top(name, module))]
    elif definition.name == EFFECTS:
        _add(text, [_statement(module.name, number) for number in acts_of(module.name)])
    elif definition.name in module.by_name:
        _add(text, [_statement(module.name, number) for number in module.by_name[definition.name]])
    else:  # `__getattr__` answers for it
        text.tokens = [f"{definition.name} of ", Definition(module.name, WHOLE)]
    return text


def _add(text: Text, parts: Iterable[Text]) -> None:
    for part in parts:
        text.tokens += part.tokens
        text.words |= part.words
        text.hidden |= part.hidden
        text.open |= part.open
        text.imported += part.imported


@cache
def acts_of(module: str) -> tuple[int, ...]:
    """The statements of a module that do more than name things: also decorators and bases that may keep a class."""
    found = module_of(module)
    if found is None or found.compiled:
        return ()
    scope = Scope(found)
    kept = (number for number, node in enumerate(found.statements) if _is_kept(node, scope))
    return tuple(sorted({*found.acts, *kept}))


def _is_kept(node: ast.stmt, scope: Scope) -> bool:
    """Whether a definition is known elsewhere for having been defined."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    if any(not is_known(decorator, scope) for decorator in node.decorator_list):
        return True
    if not isinstance(node, ast.ClassDef):
        return False
    above = all_ancestors(node, scope) - {Definition(scope.module.name, node.name)}
    return bool(node.keywords) or any(_watches(kind) for kind in above if isinstance(kind, Definition))


@cache
def _watches(kind: Definition) -> bool:
    module = module_of(kind.module)
    statements = [module.statements[n] for n in module.by_name.get(kind.name, [])] if module else []
    return any(
        getattr(part, "name", None) == "__init_subclass__" for statement in statements for part in ast.walk(statement)
    )


@cache
def _statement(module: str, number: int) -> Text:
    found = module_of(module)
    assert found is not None
    return Writer(found).written(found.statements[number])
