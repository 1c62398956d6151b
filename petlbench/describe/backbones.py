"""Backbones described: how large each family is, where methods can go into it, and which tasks it serves.

What is said of a size is read from the model itself, built without memory, so third parties' families are described
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
from petlbench.core.units import human_count

if TYPE_CHECKING:
    from rich.table import Table

    from petlbench.api.backbone import Backbone

PARTS = {"fuse": "fusion", "decode": "decoder", "pair": "order"}  # what is lent to a backbone that lacks the ability
SUPPLIED = "+fusion, +decoder, +order: with a part lent for the task, which trains and counts as the task's head"
WILDCARDS = set("*?[")
SHOWN = 6  # sizes of a family


@dataclass(frozen=True)
class Service:
    """How a backbone serves a task: with which lent parts, or why it cannot."""

    supplied: tuple[str, ...] = ()
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return "no"
        return " ".join(f"+{part}" for part in self.supplied) or "yes"


@dataclass(frozen=True)
class FamilyEntry:
    """A family in its default size, or (`family:size`) in another; `error` says why it cannot be described."""

    name: str
    distribution: str
    target: str
    parameters: int | None = None
    stacks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # by role: layers and width
    sizes: tuple[str, ...] = ()  # of the family, that of its defaults first
    default: str | None = None  # the size that the family's defaults are, if it has a name
    tasks: Mapping[str, Service] = field(default_factory=dict)
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def entries(pattern: str = "*", *, build: bool = True) -> list[FamilyEntry]:
    """Families that match a shell wildcard, or sizes that match one with a colon, such as `beit3:large-*`.

    Without `build`, parameters and stacks are left out. One that cannot be imported or built disturbs no other. Raises
    UserError where nothing matches.
    """
    family_pattern, _, size_pattern = pattern.partition(":")
    families = BACKBONES.names(family_pattern)
    if not families:
        raise UserError(f"no backbone matches '{pattern}'{_hint(family_pattern)} `petlbench list backbones` shows all")
    if not size_pattern:
        return [_entry(family, build) for family in families]
    found = [_entry(f"{family}:{size}", build) for family in families for size in _sizes_of(family, size_pattern)]
    if not found:
        raise UserError(f"no size matches '{pattern}': `petlbench list backbones {family_pattern}` shows some")
    return found


def _hint(family: str) -> str:
    return did_you_mean(family, BACKBONES.names()) or ":"


def _sizes_of(family: str, pattern: str) -> list[str]:
    """The named sizes that match; a family may know more, which are taken by their whole names."""
    try:
        kind = BACKBONES.get(family)
    except UserError:  # the family's own row says so
        return []
    found = [size for size in kind.sizes if fnmatchcase(size, pattern)]
    if not found and not WILDCARDS & set(pattern):
        kind.options_of(pattern)
        found = [pattern]
    return found


def _broken(name: str, error: Exception) -> FamilyEntry:
    said = str(error) if isinstance(error, UserError) else one_line(error)
    return FamilyEntry(name, BACKBONES.origin(name), BACKBONES.target(name), error=" ".join(said.split()))


def _entry(name: str, build: bool) -> FamilyEntry:
    try:
        kind = BACKBONES.get(name)
        config = kind.configured(name, {})
        default = _default_size(kind)
        parameters, stacks = _built(kind, config) if build else (None, {})
        return FamilyEntry(
            name,
            BACKBONES.origin(name),
            BACKBONES.target(name),
            parameters,
            stacks,
            tuple(sorted(kind.sizes, key=lambda size: size != default)),
            default,
            {task: service(kind, config, task) for task in TASKS.names()},
        )
    except Exception as error:  # somebody else's class may raise anything
        return _broken(name, error)


def _default_size(kind: type[Backbone]) -> str | None:
    """The size whose configuration is the family's default."""
    default = kind.configured("", {})
    return next((size for size in kind.sizes if kind.configured(f":{size}", {}) == default), None)


def _built(kind: Any, config: Any) -> tuple[int, dict[str, dict[str, int]]]:
    """Parameters, and layers and width of each stack."""
    import torch

    with torch.device("meta"):
        backbone: Backbone = kind(config)
    stacks = {role: backbone.stack(role) for role in backbone.roles()}
    sized = {role: {"layers": len(stack.layers), "width": stack.width} for role, stack in stacks.items()}
    return sum(p.numel() for p in backbone.parameters()), sized


def service(kind: type[Backbone], config: Any, task: str) -> Service:
    """How a backbone of this configuration serves a task."""
    asked = TASKS.get(task)()
    reason = asked.refuses(kind, config)
    if reason:
        return Service(reason=reason)
    lacking = asked.needs - kind.abilities_of(config)
    return Service(tuple(part for ability, part in PARTS.items() if ability in lacking))


def matrix(pattern: str = "*") -> list[FamilyEntry]:
    """Families and the tasks that each serves; sizes too, where they serve other tasks than their family's default."""
    found: list[FamilyEntry] = []
    for family in entries(pattern, build=False):
        sizes = [] if ":" in family.name else [_entry(f"{family.name}:{size}", False) for size in family.sizes]
        found += [family, *(size for size in sizes if size.tasks != family.tasks)]
    return found


def family_table(found: Sequence[FamilyEntry]) -> Table:
    """Parameters, stacks, sizes and tasks."""
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
        for entry in found
    ]
    table = _table(["backbone", "distribution", "parameters", "stacks", "sizes", "tasks"], rows, found)
    if any(service.supplied for entry in found for service in entry.tasks.values()):
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


def task_matrix(found: Sequence[FamilyEntry]) -> Table:
    """Backbones by tasks, and below the reasons."""
    from rich.text import Text

    tasks = TASKS.names()
    rows = [[entry.name, *(str(entry.tasks[task]) if entry.tasks else "" for task in tasks)] for entry in found]
    table = _table(["backbone", *tasks], rows, found)
    for entry in found:
        for task, service in entry.tasks.items():
            if service.reason is not None:
                table.add_row(Text(f"{entry.name}, {task}: {service.reason}"))
    table.add_row(Text(SUPPLIED, style="dim"))
    return table


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], found: Sequence[FamilyEntry]) -> Table:
    """A grid with the table in it, to which lines can be added; entries in error are named below."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    inner = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in columns:
        inner.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
    for row in rows:
        inner.add_row(*map(Text, row))
    grid = Table.grid()
    grid.add_row(inner)
    for entry in found:
        if entry.error:
            grid.add_row(Text(f"{entry.name} cannot be described: {entry.error}", style="red"))
    return grid
