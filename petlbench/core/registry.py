"""Names to classes: methods, tasks, data sets and backbones, found through entry points and imported only when used."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean, one_line

T = TypeVar("T")


class Registry(Generic[T]):
    """The classes that installed distributions offer in one entry-point group.

    Nothing is imported until `get`, so that listing is instant and one broken plug-in cannot disturb the others.
    """

    def __init__(self, group: str, kind: str, base: str) -> None:
        """`kind` is what messages call an entry; `base` is 'module:attribute' of the class all must derive from."""
        self.group = group
        self.kind = kind
        self.base = base
        self._offered: dict[str, list[EntryPoint]] = {}

    def offer(self, name: str, kind: type[T]) -> None:
        """Let this process, and no other, find a class that no distribution offers: a notebook's, say.

        Raises UserError for one that stands inside a function, where it cannot be found again.
        """
        if "<locals>" in kind.__qualname__:
            raise UserError(f"{self.kind} '{name}' is defined inside a function: define it at the top of its module")
        self._offered[name] = [EntryPoint(name, f"{kind.__module__}:{kind.__qualname__}", self.group)]

    def refuse_offered(self, name: str) -> None:
        """Raise UserError for a class that only this process finds, where others are to use it."""
        for point in self._offered.get(name.partition(":")[0], ()):
            where = "a notebook or a script" if point.module == "__main__" else point.module
            raise UserError(
                f"{self.kind} '{name}' is defined in {where}, where the processes of a run do not find it: put it into "
                f"a module of an installed distribution that names it in the entry points {self.group}"
            )

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names that match a shell wildcard."""
        return sorted(name for name in self._points() if fnmatchcase(name, pattern))

    def origin(self, name: str) -> str:
        """The distribution that offers `name`; all of them, joined by 'and', where several claim it."""
        return " and ".join(sorted(_distribution(point) for point in self._claims(name)))

    def target(self, name: str) -> str:
        """What the entry point says: 'module:attribute'."""
        return self._claims(name)[0].value

    def get(self, name: str) -> type[T]:
        """Import and return the class called `name`; UserError if unknown, claimed twice, broken or of another kind."""
        claims = self._claims(name)
        if len(claims) > 1:
            raise UserError(
                f"{self.kind} '{name}' is offered by several distributions ({self.origin(name)}): uninstall all but one"
            )
        point = claims[0]
        where = f"{self.kind} '{name}' (entry point {point.value} of distribution {_distribution(point)})"
        try:
            found = point.load()
        except (Exception, SystemExit) as error:  # somebody else's import may raise anything
            raise UserError(f"{where} cannot be imported: {one_line(error)}: mend or uninstall it") from error
        base = self._base()
        if not (isinstance(found, type) and issubclass(found, base)):
            raise UserError(f"{where} is not a subclass of {base.__module__}.{base.__qualname__}: mend or uninstall it")
        return found

    def _base(self) -> type[T]:
        module, _, attribute = self.base.partition(":")
        base: type[T] = getattr(import_module(module), attribute)
        return base

    def _points(self) -> dict[str, list[EntryPoint]]:
        found = _installed(self.group, tuple(sys.path))
        both = {name: [*found.get(name, []), *own] for name, own in self._offered.items()}
        return {**found, **both} if both else found

    def _claims(self, name: str) -> list[EntryPoint]:
        points = self._points()
        if name not in points:
            plural = self.group.rpartition(".")[2]
            hint = did_you_mean(name, points) or ":"
            raise UserError(f"unknown {self.kind} '{name}'{hint} `petlbench list {plural}` shows all")
        return points[name]


@cache
def _installed(group: str, path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Entry points by name. Reading them costs milliseconds, and every look-up asks; `path` is where they are found."""
    points: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        points.setdefault(point.name, []).append(point)
    return points


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "this process"


class Families(Registry[T]):
    """A registry whose entries come in sizes: `family:size` leads to the family's class."""

    def _claims(self, name: str) -> list[EntryPoint]:
        return super()._claims(name.partition(":")[0])


# By entry-point group: the registry's class, what messages call an entry, and the class that all must derive from.
_GROUPS: dict[str, tuple[type[Registry[Any]], str, str]] = {
    "petlbench.methods": (Registry, "method", "petlbench.api.method:Method"),
    "petlbench.tasks": (Registry, "task", "petlbench.api.task:Task"),
    "petlbench.datasets": (Registry, "data set", "petlbench.api.source:Source"),
    "petlbench.backbones": (Families, "backbone", "petlbench.api.backbone:Backbone"),
}


@cache
def registry_of(group: str) -> Registry[Any]:
    """The one registry of a group; `petlbench.api.registries` gives them their names and types."""
    cls, kind, base = _GROUPS[group]
    return cls(group, kind, base)
