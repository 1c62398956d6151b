"""Code fingerprints: a digest of all code that a definition uses, computed from source without importing it.

Starting from a class or function, the walk follows names to the project's definitions that it uses, and on to those
that they use. Definitions are numbered in the order in which the walk meets them, so their files and names do not
count. Private attributes (with an underscore) that only the project uses are numbered by their order too.
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
    """All code that a definition uses: its definitions, in the order in which the walk meets them, and their digest."""

    definitions: tuple[Definition, ...]
    digest: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{module}:{name}" for module, name in self.definitions)

    @property
    def modules(self) -> frozenset[str]:
        return frozenset(definition.module for definition in self.definitions)


def closure(start: str) -> Closure:
    """Return the code that `module:Attr`, or all of `module`, uses in petlbench and in its own top-level package.

    Each file is read once per process. Raises UserError if a module has no file, or its file cannot be read.
    """
    path, _, attribute = start.partition("[")[0].partition(":")
    module, name = path.strip(), attribute.strip().partition(".")[0]
    if module_of(module) is None:
        raise UserError(f"module {module}, which an entry point names, has no file: fix or reinstall its distribution")
    target = member(module, name) if name else Definition(module, WHOLE)
    return of(target if isinstance(target, Definition) else Definition(module, WHOLE))


def closure_of(cls: type) -> Closure | None:
    """Return the code that a class uses; None if its module has no file, as in a notebook, or is a script."""
    if cls.__module__ == "__main__" or module_of(cls.__module__) is None:
        return None
    return closure(f"{cls.__module__}:{cls.__qualname__}")


@cache
def of(start: Definition) -> Closure:
    """Return the code that a definition uses."""
    walk = _Walk()
    walk.visit(start)
    while walk.waiting:
        walk.read(walk.waiting.popleft())
    return Closure(tuple(walk.texts), digest_of(walk.written()))


def digest_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGITS]


class _Walk:
    """A breadth-first walk over definitions, in the order in which they are named."""

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
        """Visit the effects of importing modules: their own, their parent packages' and those of their imports."""
        stack = list(modules)
        while stack:
            name = stack.pop()
            if name in self.entered:
                continue
            self.entered.add(name)
            if parent := name.rpartition(".")[0]:
                stack.append(parent)
            if module := module_of(name):
                if acts_of(name):
                    self.visit(Definition(name, EFFECTS))
                stack.extend(_imported(name, tuple(module.bound.modules)))

    def read(self, definition: Definition) -> None:
        text = self.texts[definition] = text_of(definition)
        for token in text.tokens:
            if isinstance(token, Definition):
                self.visit(token)
        self.enter(name for name in text.imported if is_project(name, definition.module) and place_of(name))

    def written(self) -> Iterator[str]:
        """Yield the text of each definition, with numbers and names in place of open tokens."""
        texts = self.texts.values()
        words = set().union(*(text.words for text in texts))
        hidden = set().union(*(text.hidden for text in texts)) - words
        opened = set().union(*(text.open for text in texts))
        prefixes = tuple(name for name in opened if name.endswith("_"))  # `getattr(self, f"_read_{part}")`
        hidden = {name for name in hidden if name not in opened and not name.startswith(prefixes)}
        order: dict[str, int] = {}

        def resolved(token: Token) -> str:
            if isinstance(token, Definition):
                return f"#{self.numbers[token]}"
            if isinstance(token, Parameter):
                return f"{token.name} {token.ordinal}" if token.name in words else token.ordinal
            if isinstance(token, Private):
                return f"_{order.setdefault(token.name, len(order))} " if token.name in hidden else f"{token.name} "
            return token

        for number, text in enumerate(texts):
            yield f"#{number}: " + "".join(map(resolved, text.tokens))


@cache
def _imported(name: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    """Return the project's modules that `name` imports; `from a import b` counts for `a`, and for `a.b` if a module."""
    module = module_of(name)
    assert module is not None
    froms = [f"{o.module}.{o.name}" for origins in module.bound.origins.values() for o in origins if o.name]
    return tuple(path for path in dict.fromkeys([*modules, *froms]) if is_project(path, name) and place_of(path))


@cache
def text_of(definition: Definition) -> Text:
    """Return the text of all statements at the top of the module that bind or change the definition's name."""
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
    """Return the numbers of statements with effects beyond binding names.

    A definition has such an effect if a decorator or a base may register it somewhere.
    """
    source = module_of(module)
    if source is None or source.compiled:
        return ()
    scope = Scope(source)
    registered = (number for number, node in enumerate(source.statements) if _is_registered(node, scope))
    return tuple(sorted({*source.acts, *registered}))


def _is_registered(node: ast.stmt, scope: Scope) -> bool:
    """Return whether defining this function or class may register it with other code."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    if any(not is_known(decorator, scope) for decorator in node.decorator_list):
        return True
    if not isinstance(node, ast.ClassDef):
        return False
    parents = all_ancestors(node, scope) - {Definition(scope.module.name, node.name)}
    return bool(node.keywords) or any(_has_subclass_hook(cls) for cls in parents if isinstance(cls, Definition))


@cache
def _has_subclass_hook(cls: Definition) -> bool:
    module = module_of(cls.module)
    statements = [module.statements[n] for n in module.by_name.get(cls.name, [])] if module else []
    return any(
        getattr(part, "name", None) == "__init_subclass__" for statement in statements for part in ast.walk(statement)
    )


@cache
def _statement(module: str, number: int) -> Text:
    source = module_of(module)
    assert source is not None
    return Writer(source).written(source.statements[number])
