"""The optimizers that recipes name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class ReleasedAdamW(torch.optim.Optimizer):
    """AdamW of transformers 4.2, which the code of VL-T5, VL-Adapter, VL-PET and LST trains with.

    p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), then p <- p - lr decay p: weights decay after the
    update and not before it, and eps is not corrected for the moments' bias.
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
        """One step for all parameters that have a gradient."""
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)  # on the CPU, as torch's own: reading it waits for no device
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                t = int(state["step"])
                state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                size = lr * (1 - b2**t) ** 0.5 / (1 - b1**t)
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
                if group["weight_decay"]:
                    p.add_(p, alpha=-lr * group["weight_decay"])
