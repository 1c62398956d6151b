"""The base of methods that may have separate modules for each task: VL-Adapter's family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, TypeVar

from pydantic import Field, field_validator
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, StackedConfig
from petlbench.api.registries import TASKS
from petlbench.api.sites import current_pass
from petlbench.core.messages import did_you_mean


class PerTask(nn.Module):
    """One module per task; a pass uses the module of its task."""

    def __init__(self, make: Callable[[], nn.Module], tasks: Iterable[str]) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict({task: make() for task in tasks})

    def of(self, task: str | None) -> nn.Module:
        """Return the task's module. Raises ValueError if the task has none."""
        if task is None or task not in self.tasks:
            raise ValueError(f"no module for task '{task}', only for {', '.join(self.tasks)}")
        return self.tasks[task]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.of(current_pass().task)(x)
        return y


class TaskedConfig(StackedConfig):
    """Options of a method that may have separate modules for each task."""

    tasks: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="further tasks that get modules of their own though the cell does not train on them, since "
        "published counts are of several tasks; null: only the cell's tasks",
    )

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if tasks is not None and len(set(tasks)) < len(tasks):
            raise ValueError("tasks names a task twice: name every task once")
        names = TASKS.names()
        for task in tasks or ():
            if task not in names:
                raise ValueError(f"unknown task '{task}'{did_you_mean(task, names) or f': there are {names}'}")
        return tasks


T = TypeVar("T", bound=TaskedConfig)


class Tasked(Method[T]):
    """A method whose modules may be one per task, as its options say."""

    own: ClassVar[str] = "*.tasks.{task}.*"  # wildcard of the names that only this task trains

    def shares_all(self) -> bool:
        """Return whether one module serves all tasks at every site."""
        return False

    def all_tasks(self) -> tuple[str, ...]:
        """Return the tasks with modules of their own: first the cell's, then those of the option `tasks`."""
        return tuple(dict.fromkeys([*self.tasks, *(self.config.tasks or ())]))

    def start(self, backbone: Backbone) -> None:
        """Freeze the backbone, and declare the parameters that cannot train.

        Raises ValueError if every task needs a module and the method has no task.
        """
        if not self.shares_all():
            if not self.all_tasks():
                raise ValueError("it has modules for each task, but no task was given: make it with `make_method`")
            others = self.all_tasks()[len(self.tasks) :]
            self.unused_parameters = {
                self.own.format(task=task): "the cell does not train on this task" for task in others
            }
        backbone.freeze()

    def per_task(self, make: Callable[[], nn.Module], *, shared: bool) -> nn.Module:
        """Return one module of `make` if shared, else one module per task."""
        return make() if shared else PerTask(make, self.all_tasks())
