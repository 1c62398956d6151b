"""The canonical context computes what the ordinary operations do, and keeps the same for backward everywhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from petlbench.backbones.tiny import Tiny
from petlbench.measure.canonical import canonical
from petlbench.measure.memory import SavedTensors, saved_bytes
from tests.backbone_factory import draw, small_tiny


class Operations(TorchDispatchMode):
    """The names of all operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def gradients(
    fn: Callable[..., Tensor], *inputs: Tensor, context: AbstractContextManager[Any] | None = None
) -> list[Tensor]:
    """What `fn` gives and the gradients of every input that has one, of an uneven sum."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    with context or nullcontext():
        out = fn(*leaves)
        (out * draw(*out.shape, seed=9)).sum().backward()
    return [out, *(x.grad for x in leaves if x.grad is not None)]


def assert_same(fn: Callable[..., Tensor], *inputs: Tensor) -> None:
    ordinary, found = gradients(fn, *inputs), gradients(fn, *inputs, context=canonical())
    assert len(ordinary) == len(found)
    for one, other in zip(ordinary, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# Attention

Q, K, V = draw(2, 4, 5, 8, seed=1), draw(2, 4, 7, 8, seed=2), draw(2, 4, 7, 6, seed=3)
BLIND = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
BLIND[1, 0, 2] = False  # a query that may attend to nothing


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": BLIND},
        {"attn_mask": BLIND[0, 0], "scale": 1.0},
        {"attn_mask": draw(2, 1, 1, 7, seed=4)},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_attention_has_the_values_and_gradients_of_the_fused_one(options: dict[str, Any]) -> None:
    assert_same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), Q, K, V)


def test_attention_takes_inputs_without_heads_by_position_and_passes_gradients_to_the_mask() -> None:
    assert_same(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), Q[0], K[0], V[0], draw(5, 7, seed=5))


def test_heads_may_share_keys_and_values() -> None:
    assert_same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), Q, K[:, :2], V[:, :2])


def test_a_mask_beside_is_causal_is_an_error_as_in_torch() -> None:
    with canonical(), pytest.raises(RuntimeError, match="mask"):
        F.scaled_dot_product_attention(Q, K, V, attn_mask=BLIND, is_causal=True)


def test_attention_saves_its_map_and_one_byte_for_each_dropped_weight() -> None:
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    with canonical(), SavedTensors() as plain:
        F.scaled_dot_product_attention(q, k, v, attn_mask=BLIND)
    with canonical(), SavedTensors() as dropping:
        F.scaled_dot_product_attention(q, k, v, attn_mask=BLIND, dropout_p=0.5)
    inputs, weights = Q.numel() + K.numel() + V.numel(), 2 * 4 * 5 * 7
    assert plain.saved_bytes == 8 * (inputs + weights), "doubles; the mask is not kept"
    assert dropping.saved_bytes == plain.saved_bytes + 8 * weights + weights, "weights before and after, and the mask"


def test_torchs_own_attention_layer_is_unfused_too() -> None:
    layer, x = nn.MultiheadAttention(8, 2, dropout=0.0, batch_first=True), torch.randn(2, 5, 8, requires_grad=True)
    with Operations() as ordinary:
        layer(x, x, x, need_weights=False)
    assert any("scaled_dot_product" in name for name in ordinary.names), "or this test shows nothing"
    with canonical(), Operations() as found, SavedTensors(layer) as plain:
        layer(x, x, x, need_weights=False)
    assert not any("scaled_dot_product" in name for name in found.names)
    layer.dropout, weights = 0.5, 2 * 2 * 5 * 5
    with canonical(), SavedTensors(layer) as dropping:
        layer(x, x, x, need_weights=False)
    assert dropping.saved_bytes == plain.saved_bytes + 4 * weights + weights, "dropped weights, and one byte each"
    assert F.dropout.__name__ == "dropout" and F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"


# Dropout

DROPOUTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "F.dropout": lambda x, p: F.dropout(x, p),
    "nn.Dropout": lambda x, p: nn.Dropout(p)(x),
    "torch.dropout": lambda x, p: torch.dropout(x, p, True),
}


@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
def test_dropout_keeps_one_byte_an_element_and_nothing_else(dropout: Callable[[Tensor, float], Tensor]) -> None:
    x = draw(100, 100).requires_grad_()
    with canonical(), SavedTensors() as saved:
        y = dropout(x, 0.25)
    assert saved.saved_bytes == x.numel()
    y.sum().backward()
    kept = y != 0
    assert 0.7 < kept.double().mean() < 0.8
    torch.testing.assert_close(y, x * kept / 0.75)
    torch.testing.assert_close(x.grad, kept / torch.tensor(0.75, dtype=torch.float64))


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.Dropout(0.5).eval()], ids=["p = 0", "evaluation"])
def test_dropout_that_drops_nothing_saves_nothing(layer: nn.Module) -> None:
    x = draw(10).requires_grad_()
    with canonical(), SavedTensors() as saved:
        assert torch.equal(layer(x), x)
    assert saved.saved_bytes == 0


def test_dropping_everything_gives_zeros_without_nan() -> None:
    x = draw(10).requires_grad_()
    with canonical():
        y = F.dropout(x, 1.0)
        y.sum().backward()
    assert not y.any() and not x.grad.any()  # type: ignore[union-attr]


def test_dropout_in_place_changes_its_input() -> None:
    x = torch.ones(1000)
    with canonical():
        y = F.dropout(x, 0.5, inplace=True)
    assert y is x and set(x.tolist()) == {0.0, 2.0}


def test_dropout_under_another_name_is_replaced_too() -> None:
    alias = F.dropout
    x = draw(100).requires_grad_()
    with canonical(), SavedTensors() as saved:
        alias(x, 0.5)
    assert saved.saved_bytes == 100


def test_dropout_is_ordinary_again_afterwards() -> None:
    x = torch.ones(10, requires_grad=True)
    with canonical():
        inside = F.dropout(x, 0.5)
    assert type(inside.grad_fn).__name__ == "_DropoutBackward" != type(F.dropout(x, 0.5).grad_fn).__name__


def test_a_layer_that_is_computed_again_in_backward_drops_the_same_elements() -> None:
    x = draw(100).requires_grad_()
    with canonical():
        y = checkpoint(lambda x: F.dropout(x.square(), 0.5), x, use_reentrant=False)
        y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, 2 * y / x)  # of y = x squared, doubled or dropped


# Whole backbones


def loss_of(backbone: Tiny, words: int = 6) -> Callable[[], Tensor]:
    """Two sentences, one of them padded, fused and decoded."""
    texts = backbone.texts(["red circle", "the small blue square on the left"], 16).to(
        backbone.token_embedding.weight.device
    )

    def loss() -> Tensor:
        memory = backbone.fuse(backbone.embed_text(texts), task="vqa")
        return backbone.decode(memory, texts.ids[:, :words], task="vqa")[0].square().mean()

    return loss


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_backbone_computes_the_same(attention: str) -> None:
    backbone = small_tiny(attention=attention)
    loss = loss_of(backbone)

    def run() -> list[Tensor]:
        backbone.zero_grad()
        value = loss()
        value.backward()
        return [value, *(p.grad.clone() for p in backbone.parameters() if p.grad is not None)]

    ordinary = run()
    with canonical():
        found = run()
    assert len(ordinary) == len(found) > 20
    for one, other in zip(ordinary, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_backbone_saves_does_not_depend_on_its_attention_implementation(dropout: float) -> None:
    fused, unfused = (small_tiny(attention=kind, dropout=dropout).train() for kind in ("sdpa", "eager"))
    canonically = saved_bytes(loss_of(fused), fused)
    assert canonically == saved_bytes(loss_of(unfused), unfused)
    with SavedTensors(fused) as natively:
        loss_of(fused)()
    assert natively.saved_bytes != canonically, "or this test shows nothing"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_backbone_saves_is_the_same_on_the_gpu() -> None:
    backbone = small_tiny(dropout=0.1).train()
    on_cpu = saved_bytes(loss_of(backbone), backbone)
    backbone.to("cuda")
    assert saved_bytes(loss_of(backbone), backbone) == on_cpu
