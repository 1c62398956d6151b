"""From a cell to the objects it names: data, backbone, and the setting in which a method is trained."""

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
    """The cell's backbone; what its weights leave open is drawn from the cell's seed."""
    kind: Any = BACKBONES.get(cell.backbone)
    seed_everything(cell.seed)
    with drawing_on(device):
        backbone: Backbone = kind(kind.configured(cell.backbone, cell.backbone_config))
    return backbone.to(device)


def build_method(cell: Cell, kind: type[Method] | None = None) -> Method:
    """The cell's method as configured, told the cell's task. `kind`: its class, where it is not registered."""
    return make_method(kind or METHODS.get(cell.method), cell.method_config, [cell.task])


def drawing_on(device: torch.device) -> AbstractContextManager[Any]:
    """Where new values are drawn: on the CPU, so that they are the same on every device; the meta device has none."""
    return device if device.type == "meta" else torch.device("cpu")


def attach_head(backbone: Backbone, task: Task, device: torch.device) -> tuple[Backbone, nn.Module]:
    """An adapted backbone with what it lacks for `task` lent, and the task's head.

    Where the head is one that the backbone was published with, it trains as the backbone says, and the backbone's
    heads for other tasks do not.
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
    """The backbone adapted, with the task's head, ready to train; and the handle that restores the backbone.

    `method` defaults to the cell's own. Raises UserError when nothing is left to train, or nothing can be compiled.
    """
    method, device = method or build_method(cell), context.device
    seed_everything(cell.seed)
    with drawing_on(device):
        adapted, handle = adapt(method, backbone)
    extended, head = attach_head(adapted, task, device)
    prepare(extended, cell.recipe, device)
    seed_everything(cell.seed + 1)  # dropout, whatever the method drew
    setup = TrainingSetup(extended, head, task, cell.recipe, cell.seed, context, method)
    if not setup.trainable():
        raise UserError(f"method '{cell.method}' leaves nothing to train on task '{task.name}'")
    return setup, handle
