"""Operations against counts worked out by hand, and that nothing that multiplies matrices goes uncounted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from petlbench.api.registries import TASKS
from petlbench.core.cell import Cell
from petlbench.core.record import Flops
from petlbench.measure.flops import counter, step_flops
from petlbench.pipeline.assembly import build_backbone, build_setup
from petlbench.pipeline.data import load_source, load_split
from petlbench.training.context import RunContext

# By hand


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize(("frozen", "input_trains", "products"), [(False, False, 1), (False, True, 2), (True, True, 1)])
def test_a_linear_layer_costs_one_product_forward_and_one_per_gradient(
    frozen: bool, input_trains: bool, products: int
) -> None:
    linear, product = nn.Linear(8, 16).requires_grad_(not frozen), 2 * 4 * 8 * 16
    x = torch.randn(4, 8, requires_grad=input_trains)
    found = step_flops(lambda: linear(x).sum())
    assert (found.forward, found.backward, found.step) == (product, products * product, (1 + products) * product)


def test_attention_costs_two_products_forward_and_four_backward() -> None:
    batch, heads, length, width = 2, 3, 16, 8
    q, k, v = (leaf(batch, heads, length, width) for _ in range(3))
    product = 2 * batch * heads * length * length * width
    assert step_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum()) == Flops(
        forward=2 * product, backward=4 * product
    )


def test_attention_of_a_torch_layer_is_counted_with_its_projections() -> None:
    batch, length, width = 2, 5, 8
    layer, x = nn.MultiheadAttention(width, 2, batch_first=True), leaf(batch, length, width)
    projections = 4 * 2 * batch * length * width * width
    products = 2 * 2 * batch * length * length * width
    found = step_flops(lambda: layer(x, x, x, need_weights=False)[0].sum())
    assert found == Flops(forward=projections + products, backward=2 * (projections + products))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_costs_the_same_forward_and_for_each_gradient(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, x = kind(4, 8, 3, padding=1, groups=groups), leaf(2, 4, 5, 7)
    product = 2 * (2 * 5 * 7) * 3 * 3 * 4 * 8 // groups
    assert step_flops(lambda: layer(x).sum()) == Flops(forward=product, backward=2 * product)
    layer.requires_grad_(False)
    assert step_flops(lambda: layer(x).sum()) == Flops(forward=product, backward=product)
    layer.requires_grad_(True)
    assert step_flops(lambda: layer(x.detach()).sum()) == Flops(forward=product, backward=product)


@pytest.mark.parametrize(
    ("loss", "product"),
    [
        (lambda: (leaf(4, 3) @ leaf(3)).sum(), 2 * 4 * 3),
        (lambda: leaf(3) @ leaf(3), 2 * 3),
        (lambda: torch.addbmm(leaf(4, 5), leaf(2, 4, 3), leaf(2, 3, 5)).sum(), 2 * 2 * 4 * 3 * 5),
        (lambda: torch.baddbmm(leaf(2, 4, 5), leaf(2, 4, 3), leaf(2, 3, 5)).sum(), 2 * 2 * 4 * 3 * 5),
        (lambda: torch.addmv(leaf(4), leaf(4, 3), leaf(3)).sum(), 2 * 4 * 3),
        (lambda: torch.einsum("bik,bkj->bij", leaf(2, 4, 3), leaf(2, 3, 5)).sum(), 2 * 2 * 4 * 3 * 5),
    ],
    ids=["matrix times vector", "vector times vector", "addbmm", "baddbmm", "addmv", "einsum"],
)
def test_products_that_torchs_counter_may_leave_out_are_counted(loss: Callable[[], Tensor], product: int) -> None:
    assert step_flops(loss).forward == product


def test_a_recomputed_layer_costs_its_forward_pass_again_in_backward() -> None:
    layer, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU()), leaf(4, 8)
    plain = step_flops(lambda: layer(x).sum())
    again = step_flops(lambda: checkpoint(layer, x, use_reentrant=False).sum())
    assert again == Flops(forward=plain.forward, backward=plain.backward + plain.forward)


# The backbones

# These multiply and accumulate over no contracted dimension: they look at each element a fixed number of times, reduce,
# move or make elements. Everything else has to be in the counter's registry.
COUNT_AS_ZERO = {
    "element by element": """abs add add_ bitwise_and bitwise_and_ bitwise_not bitwise_or clamp clamp_max clamp_min
        copy_ cos div div_ eq exp fill_ ge gelu gelu_backward gt isinf isnan le log logical_and logical_not logical_or
        lt masked_fill masked_fill_ maximum minimum mul mul_ ne neg pow reciprocal relu rsqrt rsub sgn sigmoid
        sigmoid_backward sign silu silu_backward sin softplus softplus_backward sqrt sub sub_ tanh tanh_backward
        threshold_backward where _to_copy zero_""",
    "reductions, norms and scans": """_log_softmax _log_softmax_backward_data _safe_softmax _softmax
        _softmax_backward_data all amax amin any argmax cumprod cumsum linalg_vector_norm logsumexp max mean min
        native_group_norm native_group_norm_backward native_layer_norm native_layer_norm_backward nll_loss_backward
        nll_loss_forward nll_loss2d_backward nll_loss2d_forward prod sum var var_mean""",
    "views, copies and rearrangements": """_reshape_alias _unsafe_view alias as_strided cat clone detach expand flip
        permute repeat reshape select select_backward slice slice_backward split split_with_sizes squeeze stack t
        transpose tril triu unbind unsqueeze unsqueeze_ view""",
    "look-ups": "embedding embedding_dense_backward gather index index_put index_put_ index_select scatter scatter_add",
    "making tensors": """_local_scalar_dense arange bernoulli_ empty empty_like full full_like lift_fresh new_empty
        new_empty_strided new_full new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like""",
}


class Operations(TorchDispatchMode):
    """All operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def uncounted(operations: set[Any]) -> list[str]:
    """Those that are neither in the counter's registry nor declared to count as zero."""
    zero = {f"aten.{name}" for names in COUNT_AS_ZERO.values() for name in names.split()}
    counted = set(counter().flop_registry)
    assert not zero & {str(operation) for operation in counted}
    return sorted(str(operation) for operation in operations - counted if str(operation) not in zero)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETLBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def training_loss(method: str, task_name: str) -> Callable[[], Tensor]:
    """The loss of two training samples on `tiny`, whose pictures differ in shape."""
    few = {"train_scenes": 2, "validation_scenes": 1, "test_scenes": 1}
    cell = Cell(method=method, task=task_name, dataset="digits", dataset_config=few, backbone="tiny")
    task, device = TASKS.get(task_name)(), torch.device("cpu")
    first, second = (load_split(cell, load_source(cell, None), task, "train")[i] for i in range(2))
    second = {**second, "image": second["image"].resize((64, 48))}
    setup, _ = build_setup(cell, build_backbone(cell, device), task, RunContext.on(device))
    batch = task.collate([first, second], setup.backbone, np.random.default_rng(0))
    setup.modules().eval()
    return lambda: task.loss(setup.backbone, setup.head, batch)


@pytest.mark.parametrize(
    ("method", "task"),
    [*(("full", task) for task in ("rec", "vqa", "captioning", "retrieval")), ("lora", "vqa"), ("vl_adapter", "vqa")],
)
def test_no_operation_with_a_contraction_goes_uncounted(method: str, task: str) -> None:
    loss = training_loss(method, task)
    with Operations() as found:
        flops = step_flops(loss)
    assert uncounted(found.seen) == []
    assert flops.forward > 0 and flops.backward > 0


def test_an_operation_that_the_counter_does_not_know_is_named() -> None:
    with Operations() as found:
        F.bilinear(torch.ones(2, 3), torch.ones(2, 4), torch.ones(5, 3, 4))
    assert uncounted(found.seen) == ["aten._trilinear"]


def test_a_frozen_backbone_spares_its_weight_gradients() -> None:
    full, lora, head_only = (step_flops(training_loss(m, "vqa")) for m in ("full", "lora", "head_only"))
    assert full.forward < lora.forward, "the path beside the weights costs something"
    assert head_only.backward < lora.backward < full.backward
