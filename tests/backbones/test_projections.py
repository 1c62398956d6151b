"""Parallel paths at projections, whole or packed: add, remove and fold them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from petlbench.api.sites import Projection
from tests.backbone_factory import draw, randomise
from tests.layer_cases import FAMILIES, B, D, N, make


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_paths_beside_packed_rows_come_and_go_in_any_order(order: tuple[int, ...]) -> None:
    owner = nn.Module()
    owner.qkv = packed = randomise(nn.Linear(D, 12))
    rows = [slice(0, 4), slice(8, None), slice(0, 4)]  # query, value, query again
    x = draw(B, N, D)
    beside = [
        (Projection(owner, "qkv", part), part, randomise(nn.Linear(D, 4, bias=False), seed))
        for seed, part in enumerate(rows)
    ]
    for projection, _, path in beside:
        assert (projection.in_features, projection.out_features, projection.linear) == (D, 4, packed)
        projection.add(path)
    left = list(range(3))
    for index in [None, *order]:
        if index is not None:
            projection, _, path = beside[index]
            projection.remove(path)
            left.remove(index)
            with pytest.raises(ValueError, match="no such path"):
                projection.remove(path)
        expected = packed(x)
        for _, part, path in (beside[i] for i in left):
            expected[..., part] += path(x)
        torch.testing.assert_close(owner.qkv(x), expected, rtol=0, atol=1e-12)
    assert owner.qkv is packed
    before = packed.weight.detach().clone()
    for projection, part, path in beside:
        projection.fold(path.weight)
        before[part] += path.weight
    assert torch.equal(packed.weight, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_named_projection_takes_part_in_the_forward_pass(family: str) -> None:
    case, x = make(family), draw(B, N, D)
    plain, _ = case.layer(x, case.context)
    attention = {"q", "k", "v", "o"}
    for name, sublayer in case.layer.items():
        assert set(sublayer.projections) == ({"in", "out"} if name == "ffn" else attention)
        assert sublayer.width == D
        for role, projection in sublayer.projections.items():
            path = randomise(nn.Linear(projection.in_features, projection.out_features, bias=False))
            saved = projection.linear.weight.detach().clone()
            projection.add(path)
            beside, _ = case.layer(x, case.context)
            assert not torch.allclose(beside, plain), (name, role)
            projection.remove(path)
            assert torch.equal(case.layer(x, case.context)[0], plain)
            projection.fold(path.weight)
            torch.testing.assert_close(case.layer(x, case.context)[0], beside, rtol=0, atol=1e-10)
            projection.linear.weight.data.copy_(saved)


def test_projections_of_a_copy_belong_to_the_copy() -> None:
    case, x = make("bart_encoder"), draw(B, N, D)
    plain, _ = case.layer(x, case.context)
    twin = copy.deepcopy(case.layer)
    twin["attention"].projections["v"].add(randomise(nn.Linear(D, D)))
    assert torch.equal(case.layer(x, case.context)[0], plain)
    assert not torch.allclose(twin(x, case.context)[0], plain)
