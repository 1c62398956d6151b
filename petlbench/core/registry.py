"""Find methods, tasks, data sets and backbones by name through entry points; import each only when it is used."""

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

    Only `get` imports, so listing is fast and a broken plug-in does not affect the others.
    """

    def __init__(self, group: str, kind: str, base: str) -> None:
        """Errors call an entry `kind`; every class must derive from `base`, given as 'module:attribute'."""
        self.group = group
        self.kind = kind
        self.base = base
        self._offered: dict[str, list[EntryPoint]] = {}

    def offer(self, name: str, kind: type[T]) -> None:
        """Register a class for this process only, such as a class defined in a notebook.

        Raises UserError if the class is defined inside a function, because no import can reach it there.
        """
        if "<locals>" in kind.__qualname__:
            raise UserError(f"{self.kind} '{name}' is defined inside a function: define it at the top of its module")
        self._offered[name] = [EntryPoint(name, f"{kind.__module__}:{kind.__qualname__}", self.group)]

    def refuse_offered(self, name: str) -> None:
        """Raise UserError if only this process can find the class `name`, because other processes must use it."""
        for point in self._offered.get(name.partition(":")[0], ()):
            where = "a notebook or a script" if point.module == "__main__" else point.module
            raise UserError(
                f"{self.kind} '{name}' is defined in {where}, where the processes of a run cannot find it: put it into "
                f"a module of an installed distribution that names it in the entry points {self.group}"
            )

    def names(self, pattern: str = "*") -> list[str]:
        """Return the sorted names that match a shell wildcard."""
        return sorted(name for name in self._points() if fnmatchcase(name, pattern))

    def origin(self, name: str) -> str:
        """Return the distribution that offers `name`; if several do, join their names by 'and'."""
        return " and ".join(sorted(_distribution(point) for point in self._claims(name)))

    def target(self, name: str) -> str:
        """Return the value of the entry point: 'module:attribute'."""
        return self._claims(name)[0].value

    def get(self, name: str) -> type[T]:
        """Import and return the class `name`.

        Raises UserError if the name is unknown or claimed twice, or the class is broken or not derived from `base`.
        """
        claims = self._claims(name)
        if len(claims) > 1:
            raise UserError(
                f"{self.kind} '{name}' is offered by several distributions ({self.origin(name)}): uninstall all but one"
            )
        point = claims[0]
        where = f"{self.kind} '{name}' (entry point {point.value} of distribution {_distribution(point)})"
        try:
            cls = point.load()
        except (Exception, SystemExit) as error:  # the import of a plug-in may raise anything
            raise UserError(f"{where} cannot be imported: {one_line(error)}: fix or uninstall it") from error
        base = self._base()
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise UserError(f"{where} is not a subclass of {base.__module__}.{base.__qualname__}: fix or uninstall it")
        return cls

    def _base(self) -> type[T]:
        module, _, attribute = self.base.partition(":")
        base: type[T] = getattr(import_module(module), attribute)
        return base

    def _points(self) -> dict[str, list[EntryPoint]]:
        installed = _installed(self.group, tuple(sys.path))
        merged = {name: [*installed.get(name, []), *points] for name, points in self._offered.items()}
        return {**installed, **merged} if merged else installed

    def _claims(self, name: str) -> list[EntryPoint]:
        points = self._points()
        if name not in points:
            plural = self.group.rpartition(".")[2]
            hint = did_you_mean(name, points) or ":"
            raise UserError(f"unknown {self.kind} '{name}'{hint} `petlbench list {plural}` shows all")
        return points[name]


def is_wildcard(pattern: str) -> bool:
    """Return whether a pattern is more than a name."""
    return bool(set("*?[") & set(pattern))


@cache
def _installed(group: str, path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Return entry points by name. Cached, because reading takes milliseconds and each look-up needs it.

    `path` (sys.path) is part of the cache's key, because the entry points are found along it.
    """
    points: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        points.setdefault(point.name, []).append(point)
    return points


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "this process"


class Families(Registry[T]):
    """A registry whose entries have sizes: it finds the family's class for `family:size`."""

    def _claims(self, name: str) -> list[EntryPoint]:
        return super()._claims(name.partition(":")[0])


# By entry-point group: the class of the registry, the word for an entry in errors, and the base class of all entries.
_GROUPS: dict[str, tuple[type[Registry[Any]], str, str]] = {
    "petlbench.methods": (Registry, "method", "petlbench.api.method:Method"),
    "petlbench.tasks": (Registry, "task", "petlbench.api.task:Task"),
    "petlbench.datasets": (Registry, "data set", "petlbench.api.source:Source"),
    "petlbench.backbones": (Families, "backbone", "petlbench.api.backbone:Backbone"),
}


@cache
def registry_of(group: str) -> Registry[Any]:
    """Return the one registry of a group; `petlbench.api.registries` gives each a name and a type."""
    cls, kind, base = _GROUPS[group]
    return cls(group, kind, base)
