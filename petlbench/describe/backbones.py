"""Describe backbones: how large each family is, where methods can go into it, and which tasks it serves.

The figures of a size are read from the model itself, built without memory, so that plug-ins' families are described
like the built-in ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from petlbench.api.registries import BACKBONES, TASKS
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean, one_line
from petlbench.core.registry import is_wildcard
from petlbench.core.tables import plain_table
from petlbench.core.units import human_count

if TYPE_CHECKING:
    from rich.table import Table

    from petlbench.api.backbone import Backbone

PARTS = {
    "fuse": "fusion",
    "decode": "decoder",
    "pair": "order",
}  # the part supplied for an ability that a backbone lacks
SUPPLIED = "+fusion, +decoder, +order: a part supplied for the task; it trains and counts as the task's head"
SHOWN = 6  # sizes of a family listed by name


@dataclass(frozen=True)
class Service:
    """How a backbone serves a task: with which supplied parts, or the reason why it cannot."""

    supplied: tuple[str, ...] = ()
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return "no"
        return " ".join(f"+{part}" for part in self.supplied) or "yes"


@dataclass(frozen=True)
class FamilyEntry:
    """A family in its default size, or in another (`family:size`); `error` says why it cannot be described."""

    name: str
    distribution: str
    target: str
    parameters: int | None = None
    stacks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # by role: layers and width
    sizes: tuple[str, ...] = ()  # of the family, the default first
    default: str | None = None  # name of the size that equals the family's defaults, if it has one
    tasks: Mapping[str, Service] = field(default_factory=dict)
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def entries(pattern: str = "*", *, build: bool = True) -> list[FamilyEntry]:
    """Describe the families that match a shell wildcard, or the sizes that match `family:size` (`beit3:large-*`).

    Without `build`, parameters and stacks are left out. One that cannot be imported or built gets an entry with its
    error. Raise UserError if nothing matches.
    """
    family_pattern, _, size_pattern = pattern.partition(":")
    families = BACKBONES.names(family_pattern)
    if not families:
        raise UserError(f"no backbone matches '{pattern}'{_hint(family_pattern)} `petlbench list backbones` shows all")
    if not size_pattern:
        return [_entry(family, build) for family in families]
    sizes = [_entry(f"{family}:{size}", build) for family in families for size in _sizes_of(family, size_pattern)]
    if not sizes:
        raise UserError(f"no size matches '{pattern}': `petlbench list backbones {family_pattern}` shows some")
    return sizes


def _hint(family: str) -> str:
    return did_you_mean(family, BACKBONES.names()) or ":"


def _sizes_of(family: str, pattern: str) -> list[str]:
    """Return the named sizes that match; a size that the family knows but does not list matches by its whole name."""
    try:
        cls = BACKBONES.get(family)
    except UserError:  # the family's own entry states the error
        return []
    sizes = [size for size in cls.sizes if fnmatchcase(size, pattern)]
    if not sizes and not is_wildcard(pattern):
        cls.options_of(pattern)  # raises if there is no such size
        sizes = [pattern]
    return sizes


def _broken(name: str, error: Exception) -> FamilyEntry:
    message = str(error) if isinstance(error, UserError) else one_line(error)
    return FamilyEntry(name, BACKBONES.origin(name), BACKBONES.target(name), error=" ".join(message.split()))


def _entry(name: str, build: bool) -> FamilyEntry:
    try:
        cls = BACKBONES.get(name)
        config = cls.configured(name, {})
        default = _default_size(cls)
        parameters, stacks = _built(cls, config) if build else (None, {})
        return FamilyEntry(
            name,
            BACKBONES.origin(name),
            BACKBONES.target(name),
            parameters,
            stacks,
            tuple(sorted(cls.sizes, key=lambda size: size != default)),
            default,
            {task: service(cls, config, task) for task in TASKS.names()},
        )
    except Exception as error:  # a plug-in's class may raise anything
        return _broken(name, error)


def _default_size(cls: type[Backbone]) -> str | None:
    """Return the size whose options equal the family's defaults."""
    default = cls.configured("", {})
    return next((size for size in cls.sizes if cls.configured(f":{size}", {}) == default), None)


def _built(cls: Any, config: Any) -> tuple[int, dict[str, dict[str, int]]]:
    """Return the number of parameters, and the layers and width of each stack."""
    import torch

    with torch.device("meta"):
        backbone: Backbone = cls(config)
    stacks = {role: backbone.stack(role) for role in backbone.roles()}
    sized = {role: {"layers": len(stack.layers), "width": stack.width} for role, stack in stacks.items()}
    return sum(p.numel() for p in backbone.parameters()), sized


def service(cls: type[Backbone], config: Any, task: str) -> Service:
    """Return how a backbone with these options serves a task."""
    instance = TASKS.get(task)()
    reason = instance.refuses(cls, config)
    if reason:
        return Service(reason=reason)
    lacking = instance.needs - cls.abilities_of(config)
    return Service(tuple(part for ability, part in PARTS.items() if ability in lacking))


def matrix(pattern: str = "*") -> list[FamilyEntry]:
    """Describe families and the tasks they serve; a size that serves other tasks than the default has its own entry."""
    result: list[FamilyEntry] = []
    for family in entries(pattern, build=False):
        sizes = [] if ":" in family.name else [_entry(f"{family.name}:{size}", False) for size in family.sizes]
        result += [family, *(size for size in sizes if size.tasks != family.tasks)]
    return result


def family_table(families: Sequence[FamilyEntry]) -> Table:
    """Return a table of parameters, stacks, sizes and tasks."""
    from rich.text import Text

    rows = [
        [
            entry.name,
            entry.distribution,
            "" if entry.parameters is None else human_count(entry.parameters),
            ", ".join(f"{role} {stack['layers']} x {stack['width']}" for role, stack in entry.stacks.items()),
            _sizes(entry),
            ", ".join(_task(task, service) for task, service in entry.tasks.items() if service.reason is None),
        ]
        for entry in families
    ]
    table = _table(["backbone", "distribution", "parameters", "stacks", "sizes", "tasks"], rows, families)
    if any(service.supplied for entry in families for service in entry.tasks.values()):
        table.add_row(Text(SUPPLIED, style="dim"))
    table.add_row(Text("parameters and stacks of the default size; layers x width", style="dim"))
    return table


def _task(name: str, service: Service) -> str:
    return f"{name} ({service})" if service.supplied else name


def _sizes(entry: FamilyEntry) -> str:
    if ":" in entry.name:
        return ""
    shown = [f"{size} (default)" if size == entry.default else size for size in entry.sizes[:SHOWN]]
    more = len(entry.sizes) - SHOWN
    return ", ".join(shown) + (f" and {more} more: '{entry.name}:*' lists them" if more > 0 else "")


def task_matrix(families: Sequence[FamilyEntry]) -> Table:
    """Return a table of backbones by tasks, with the reasons for each `no` below."""
    from rich.text import Text

    tasks = TASKS.names()
    rows = [[entry.name, *(str(entry.tasks[task]) if entry.tasks else "" for task in tasks)] for entry in families]
    table = _table(["backbone", *tasks], rows, families)
    for entry in families:
        for task, service in entry.tasks.items():
            if service.reason is not None:
                table.add_row(Text(f"{entry.name}, {task}: {service.reason}"))
    table.add_row(Text(SUPPLIED, style="dim"))
    return table


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], families: Sequence[FamilyEntry]) -> Table:
    """Return a grid with the table, to which lines can be added; the errors of entries follow below."""
    from rich.table import Table
    from rich.text import Text

    inner = plain_table(columns, ["parameters"], wrap=True)
    for row in rows:
        inner.add_row(*map(Text, row))
    grid = Table.grid()
    grid.add_row(inner)
    for entry in families:
        if entry.error:
            grid.add_row(Text(f"{entry.name} cannot be described: {entry.error}", style="red"))
    return grid
