"""Build what a cell names: its backbone, its method, and the setup in which the method is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, adapt, make_method
from petlbench.api.registries import BACKBONES, METHODS
from petlbench.api.snapshot import Snapshot
from petlbench.api.task import Task
from petlbench.backbones.supplied import supply
from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.training.context import RunContext
from petlbench.training.precision import prepare
from petlbench.training.seeds import seed_everything
from petlbench.training.setup import TrainingSetup


def build_backbone(cell: Cell, device: torch.device) -> Backbone:
    """Return the cell's backbone; the cell's seed draws the values that no weights file gives."""
    cls: Any = BACKBONES.get(cell.backbone)
    seed_everything(cell.seed)
    with drawing_on(device):
        backbone: Backbone = cls(cls.configured(cell.backbone, cell.backbone_config))
    return backbone.to(device)


def build_method(cell: Cell, cls: type[Method] | None = None) -> Method:
    """Return the cell's method, configured for the cell's task. `cls`: its class, if it is not registered."""
    return make_method(cls or METHODS.get(cell.method), cell.method_config, [cell.task])


def drawing_on(device: torch.device) -> AbstractContextManager[Any]:
    """Draw new values on the CPU, so that every device gets the same ones; the meta device has no values."""
    return device if device.type == "meta" else torch.device("cpu")


def attach_head(backbone: Backbone, task: Task, device: torch.device) -> tuple[Backbone, nn.Module]:
    """Add to an adapted backbone the parts that `task` needs and it lacks; return it with the task's head.

    If the backbone was published with a head for the task, the backbone says whether that head trains; its heads for
    other tasks do not train.
    """
    own = backbone.own_head(task.name)
    for head in backbone.own_heads.values():
        if head is not own:
            head.requires_grad_(False)
        elif backbone.trains_heads:
            head.requires_grad_(True)
    with drawing_on(device):
        extended = supply(backbone, task.needs)
        head = task.head(backbone)
    return extended.to(device), head.to(device)


def build_setup(
    cell: Cell, backbone: Backbone, task: Task, context: RunContext, *, method: Method | None = None
) -> tuple[TrainingSetup, Snapshot]:
    """Adapt the backbone and attach the task's head; return the setup, and the handle that restores the backbone.

    `method` defaults to the cell's own. Raise UserError if nothing is left to train, or if torch cannot compile.
    """
    method, device = method or build_method(cell), context.device
    seed_everything(cell.seed)
    with drawing_on(device):
        adapted, handle = adapt(method, backbone)
    extended, head = attach_head(adapted, task, device)
    prepare(extended, cell.recipe, device)
    seed_everything(cell.seed + 1)  # dropout must not depend on what the method drew
    setup = TrainingSetup(extended, head, task, cell.recipe, cell.seed, context, method)
    if not setup.trainable():
        raise UserError(f"method '{cell.method}' leaves nothing to train on task '{task.name}'")
    return setup, handle
