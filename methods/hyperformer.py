"""Hyperformer (Karimi Mahabadi et al., ACL 2021), as VL-Adapter's repository configures it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone
from petlbench.api.method import About, SizeOption, place, train
from petlbench.api.sites import Stack, current_pass

from .layers import gelu_tanh, reduced
from .per_task import Tasked, TaskedConfig

Affine = tuple[Tensor, Tensor]  # weight (out, in) and bias (out,)
STD = 0.01  # of the authors' linear layers


class Generator(nn.Module):
    """e (p,) -> weight reshape(U e + c) (rows, columns), row by row, and bias U' e + c' (rows,)."""

    def __init__(self, projected: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Linear(projected, rows * columns), nn.Linear(projected, rows)
        self.rows = rows

    def forward(self, e: Tensor) -> Affine:
        return self.weight(e).unflatten(-1, (self.rows, -1)), self.bias(e)


class HyperNetwork(nn.Module):
    """The generator of one stack's adapters: e = LN(W_b relu(W_a [t; l] + b_a) + b_b), then a generator per matrix.

    `tasks` holds the embedding t (D,) of each task; the networks of all stacks share it. The embeddings l are
    (layers, D).
    """

    def __init__(
        self, tasks: nn.ParameterDict, *, layers: int, places: Sequence[str], width: int, rank: int, hidden: int,
        projected: int,
    ) -> None:  # fmt: skip
        super().__init__()
        dim = len(next(iter(tasks.values())))
        self.tasks, self.layers = tasks, nn.Parameter(torch.randn(layers, dim))
        self.enter, self.leave = nn.Linear(2 * dim, hidden), nn.Linear(hidden, projected)
        self.norm = nn.LayerNorm(projected, eps=1e-6)
        self.down = nn.ModuleDict({name: Generator(projected, rank, width) for name in places})
        self.up = nn.ModuleDict({name: Generator(projected, width, rank) for name in places})

    def draw(self, std: float, layers: float) -> None:
        """Draw linear weights from N(0, std^2) and layer embeddings from N(0, layers^2); set linear biases to 0."""
        nn.init.normal_(self.layers, std=layers)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, task: str | None, layer: int, where: str) -> tuple[Affine, Affine]:
        """Generate both projections of the adapter at one place. Raises ValueError if the task has no embedding."""
        if task is None or task not in self.tasks:
            raise ValueError(f"no embedding for task '{task}', only for {', '.join(self.tasks)}")
        e = torch.cat([self.tasks[task], self.layers[layer]])
        e = self.norm(self.leave(F.relu(self.enter(e))))
        return self.down[where](e), self.up[where](e)


class GeneratedAdapter(nn.Module):
    """u = h + W_u gelu_t(W_d h + b_d) + b_u with the weights of the pass's task; (…, d) -> (…, d)."""

    def __init__(self, network: HyperNetwork, layer: int, where: str) -> None:
        super().__init__()
        self.network, self.layer, self.where = network, layer, where

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        down, up = self.network(current_pass().task, self.layer, self.where)
        return h + F.linear(gelu_tanh(F.linear(h, *down)), *up)


class HyperformerConfig(TaskedConfig):
    """Sizes; the defaults are those of VL-Adapter's scripts for BART-base."""

    reduction: int = Field(8, gt=0, description="rank of a generated adapter = width // reduction, at least 1")
    task_dim: int | None = Field(
        None, gt=0, description="size of task and layer embeddings; null: two thirds of the widest stack, 512 at 768"
    )
    hidden: int | None = Field(None, gt=0, description="hidden size of a hyper-network; null: width / 6, 128 at 768")
    projected: int = Field(8, gt=0, description="size of e, the input of the weight generators")
    train_norms: bool | None = Field(
        None,
        description="also train norms of the adapted stacks, gains and biases; null: only norms with a bias, as "
        "released, which excludes T5's",
    )


class Hyperformer(Tasked[HyperformerConfig]):
    """VL-Adapter's bottlenecks, whose weights one network per stack generates from embeddings of task and layer.

    e = LN(W_b relu(W_a [t; l] + b_a) + b_b); W_d = reshape(U e + c), likewise W_u, b_d, b_u at each sub-layer's place;
    u = h + W_u gelu(W_d h + b_d) + b_u. All stacks share the task embeddings, N(0, 1). Every pass generates the weights
    anew, for all tokens at once; each place computes e, which costs less than one token does.

    In the repository BART's generic initialisation N(0, 0.02^2) / 0 overrides the intended N(0, 0.01^2) / 0 of linear
    layers, and reaches layer embeddings; T5 keeps the intended values, and N(0, 1) for embeddings. The same norms train
    as in VL-Adapter. Here every stack with sites has a network, a vision transformer's too.
    """

    Config = HyperformerConfig
    about = About(
        paper="Karimi Mahabadi et al., ACL 2021; VL-Adapter",
        trains="hyper-networks, embeddings; norms (not T5's)",
        verified="authors' code: generated weights and adapters, counts",
    )
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    size_option = SizeOption("reduction", (48, 24, 12, 8, 4, 2))
    own = "*.network.tasks.{task}"

    def adapt(self, backbone: Backbone) -> Backbone:
        self.start(backbone)
        t5, stacks = backbone.initialisation == "t5", self.stacks(backbone)
        dim = self.config.task_dim or max(1, max(stack.width for stack in stacks) * 2 // 3)
        tasks = nn.ParameterDict([(task, nn.Parameter(torch.randn(dim))) for task in self.all_tasks()])
        for stack in stacks:
            network = self._network(place(tasks, stack), stack, t5)
            for index, layer in enumerate(stack):
                for name, sublayer in layer.items():
                    sublayer.insert("output", GeneratedAdapter(network, index, name))
            if backbone.norm_bias if self.config.train_norms is None else self.config.train_norms:
                train(*stack.norms())
        return backbone

    def _network(self, tasks: nn.Module, stack: Stack, t5: bool) -> HyperNetwork:
        assert isinstance(tasks, nn.ParameterDict)
        network = HyperNetwork(
            tasks,
            layers=len(stack.layers),
            places=tuple(dict.fromkeys(name for layer in stack for name, _ in layer.items())),
            width=stack.width,
            rank=reduced(stack.width, self.config.reduction),
            hidden=self.config.hidden or max(1, stack.width // 6),
            projected=self.config.projected,
        )
        network.draw(STD, layers=1.0) if t5 else network.draw(0.02, layers=0.02)
        placed = place(network, stack)
        assert isinstance(placed, HyperNetwork)
        return placed
