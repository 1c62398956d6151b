"""Make the optimizer, and compute the learning rate of each parameter at each step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
from torch import nn

from petlbench.api.backbone import Backbone
from petlbench.core.recipe import Recipe


class ReleasedAdamW(torch.optim.Optimizer):
    """AdamW of transformers 4.2, with which the code of VL-T5, VL-Adapter, VL-PET and LST trains.

    p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), then p <- p - lr decay p: weights decay after the
    update, not before it, and eps is added to the uncorrected sqrt(v).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)  # on the CPU, as in torch: reading it never waits for a device
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                t = int(state["step"])
                state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                size = lr * (1 - b2**t) ** 0.5 / (1 - b1**t)
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
                if group["weight_decay"]:
                    p.add_(p, alpha=-lr * group["weight_decay"])


def optimizer(
    parameters: dict[str, nn.Parameter],
    recipe: Recipe,
    lr: float,
    backbone: Backbone | None = None,
    own: Set[str] = frozenset(),
) -> torch.optim.Optimizer:
    """Return AdamW. Biases, one-dimensional gains and the parameters that `backbone` names are not decayed.

    `own`: names of the method's parameters. A group's `scale` is the rate of its layer and owner over the peak rate.
    """
    undecayed = {f"backbone.{name}" for name in backbone.undecayed_parameters()} if backbone else set()
    depths = {role: len(backbone.stack(role).layers) for role in backbone.roles()} if backbone else {}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        decayed = "bias" not in name if recipe.released else p.ndim > 1 and name not in undecayed
        scale = layer_scale(name, depths, recipe.layer_decay) * (recipe.method_lr if name in own else 1.0)
        groups.setdefault((decayed, scale), []).append(p)
    param_groups = [
        {"params": groups[decayed, scale], "weight_decay": recipe.weight_decay if decayed else 0.0, "scale": scale}
        for decayed, scale in sorted(groups, reverse=True)
    ]
    cls = ReleasedAdamW if recipe.released else torch.optim.AdamW
    return cls(param_groups, lr=lr, betas=recipe.betas, eps=recipe.eps)


def layer_scale(name: str, depths: Mapping[str, int], decay: float) -> float:
    """Return a parameter's rate over the peak rate: decay^(L - i) in layer i of L, 1 in heads and final norms.

    Parameters below the first layer count as one more layer. `depths`: L by stack.
    """
    if match := re.search(r"\bstacks\.(\w+)\.layers\.(\d+)\.", name):
        return decay ** (depths[match[1]] - int(match[2]))
    if re.search(r"^head\.|\b(own_heads|supplied|final_norm)\.", name):
        return 1.0
    return decay ** (max(depths.values(), default=-1) + 1)


def rate(recipe: Recipe, step: int) -> float:
    """Return the rate at `step` (from 0) over the peak rate: linear warm-up, then the schedule down to the floor."""
    warm = round(recipe.warmup * recipe.steps)
    if step < warm and recipe.released:
        return step / warm
    if step < warm:
        return step / max(1, warm - 1) if recipe.warmup_from_zero else (step + 1) / warm
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "step":
        return 1.0 if 3 * step < 2 * recipe.steps else 0.1
    left = (recipe.steps - step) / max(1, recipe.steps - warm)
    fallen = left if recipe.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
    return recipe.lr_floor + (1 - recipe.lr_floor) * fallen
