"""The four registries: methods, tasks, data sets and backbones by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from petlbench.core.registry import Registry, registry_of

if TYPE_CHECKING:
    from petlbench.api.backbone import Backbone
    from petlbench.api.method import Method
    from petlbench.api.source import Source
    from petlbench.api.task import Task

METHODS: Registry[Method] = registry_of("petlbench.methods")
TASKS: Registry[Task] = registry_of("petlbench.tasks")
DATASETS: Registry[Source] = registry_of("petlbench.datasets")
BACKBONES: Registry[Backbone] = registry_of("petlbench.backbones")
