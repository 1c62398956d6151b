"""Hold everything that one training needs: backbone, head, task, recipe, seed and context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method
from petlbench.api.task import Batch, Task
from petlbench.core.recipe import Recipe
from petlbench.measure.clock import PhaseClock
from petlbench.measure.parameters import of_method
from petlbench.training.context import RunContext


@dataclass
class TrainingSetup:
    """A backbone with a task's head, ready to be trained by a recipe; and the context that it runs in."""

    backbone: Backbone
    head: nn.Module
    task: Task
    recipe: Recipe
    seed: int
    context: RunContext
    method: Method | None = None

    @property
    def device(self) -> torch.device:
        return self.context.device

    @property
    def clock(self) -> PhaseClock:
        return self.context.clock

    def prepared(self, batch: Batch) -> Batch:
        """Pin the batch in memory for CUDA, which then copies it while it computes."""
        return batch.pinned() if self.device.type == "cuda" else batch

    def modules(self) -> nn.ModuleDict:
        """Return backbone and head under the names that an adapter file uses."""
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name; a shared one occurs once."""
        return {name: p for name, p in self.modules().named_parameters() if p.requires_grad}

    def method_parameters(self) -> set[str]:
        """Return the names of the method's trainable parameters: all but those of heads and host parts."""
        backbone = self.backbone
        own = of_method(backbone, self.head, backbone.host_parameters(), backbone.head_parameters())
        ids = {id(p) for p in own}
        return {name for name, p in self.trainable().items() if id(p) in ids}
