"""Which parameters a loss can reach, read off its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from petlbench.measure.parameters import effective, of_method, reached


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


class Model(nn.Module):
    """A chain of used modules, one whose output nothing reads, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.up = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 4)
        self.unread, self.other_task = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, through: bool = False) -> Tensor:
        self.unread(x)
        h = self.frozen(x)
        y = checkpoint(self.used, h, use_reentrant=False) if through else self.used(h)
        return Doubled.apply(self.up(y)).sum()  # type: ignore[no-any-return, no-untyped-call]


def test_only_what_the_loss_can_send_a_gradient_to_is_effective() -> None:
    """Below an up-projection of zeros the gradient is zero, and yet there is one."""
    model = Model()
    loss = model(torch.randn(2, 4))
    wanted = [*model.used.parameters(), *model.up.parameters()]
    assert reached(loss) == {id(p) for p in wanted}
    assert effective(loss, model.parameters()) == sum(p.numel() for p in wanted) == 15 + 16
    loss.backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == reached(model(torch.randn(2, 4)))


def test_checkpointing_and_the_meta_device_are_seen_through() -> None:
    model = Model()
    assert reached(model(torch.randn(2, 4), True)) == reached(model(torch.randn(2, 4)))
    with torch.device("meta"):
        bare = Model()
        assert effective(bare(torch.randn(2, 4), True), bare.parameters()) == 31


def test_a_shared_parameter_counts_once_and_a_frozen_one_never() -> None:
    model = Model()
    tied = nn.Linear(4, 3)
    tied.weight = model.used.weight
    loss = model(torch.randn(2, 4)) + tied(torch.ones(1, 4)).sum()
    assert effective(loss, [*model.parameters(), *tied.parameters()]) == 31 + 3
    assert effective(loss, model.frozen.parameters()) == 0


def test_a_loss_without_a_graph_reaches_itself_or_nothing() -> None:
    leaf = torch.zeros((), requires_grad=True)
    assert reached(leaf) == {id(leaf)}
    assert reached(torch.zeros(())) == set()


def test_a_methods_own_are_those_that_train_and_are_neither_hosts_nor_heads() -> None:
    model, head = Model(), nn.Linear(4, 1)
    model.get_submodule("other_task").requires_grad_(False)
    own = of_method(model, model.up, {"used.weight", "used.bias"}, {"unread.bias"})
    assert [id(p) for p in own] == [id(model.unread.weight)]
    assert of_method(model, head, set())[0] is model.used.weight
