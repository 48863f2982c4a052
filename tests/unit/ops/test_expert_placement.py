"""EPLB: the published example, and what holds for any loads."""

import pytest
import torch
from torch import Tensor

from lowlat.ops.expert_placement import imbalance, rebalance_experts
from lowlat.utils.errors import UserError

EXAMPLE = torch.tensor(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_the_published_example():
    phy2log, log2phy, logcnt = rebalance_experts(EXAMPLE, 16, 4, 2, 8)
    assert phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    _check_maps(phy2log, log2phy, logcnt)


def _check_maps(phy2log: Tensor, log2phy: Tensor, logcnt: Tensor) -> None:
    """log2phy and logcnt are the inverse of phy2log."""
    for owners, places, counts in zip(phy2log, log2phy, logcnt, strict=True):
        for expert, own in enumerate(places):
            found = sorted(own[own >= 0].tolist())
            assert found == (owners == expert).nonzero().flatten().tolist()
            assert counts[expert] == len(found) > 0
    assert log2phy.shape[2] == logcnt.max()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("experts", "replicas", "groups", "nodes", "devices"),
    [(64, 64, 8, 4, 8), (64, 80, 8, 2, 16), (60, 64, 3, 2, 8), (256, 288, 8, 4, 32)],
)
def test_properties_on_random_loads(
    seed: int, experts: int, replicas: int, groups: int, nodes: int, devices: int
):
    generator = torch.Generator().manual_seed(seed)
    loads = torch.randn(3, experts, generator=generator).mul(2).exp()
    found = rebalance_experts(loads, replicas, groups, nodes, devices)
    phy2log, _log2phy, logcnt = found
    assert phy2log.shape == (3, replicas)
    _check_maps(*found)
    parts = nodes if groups % nodes == 0 else 1
    if parts > 1:
        size = experts // groups
        own = (phy2log // size).unflatten(1, (nodes, -1))
        for layer in own:
            per_node = [set(node.tolist()) for node in layer]
            assert sum(map(len, per_node)) == groups  # a group is in one node
            assert all(len(node) == groups // nodes for node in per_node)
    # the heaviest experts have the most replicas, among those of a node
    for row, count, owners in zip(loads, logcnt, phy2log, strict=True):
        for node in owners.unflatten(0, (parts, -1)):
            held = node.unique()
            load, number = row[held], count[held]
            if (number > 1).any():
                least = (load / (number - 1).clamp(min=1))[number > 1].min()
                assert (load / number).max() <= least + 1e-4
    in_order = torch.arange(experts).expand(3, -1)
    if experts % devices == 0:
        before = imbalance(loads, in_order, devices)
        assert (imbalance(loads, phy2log, devices) <= before + 1e-9).all()


def test_equal_loads_stay_balanced():
    phy2log, _, logcnt = rebalance_experts(torch.ones(1, 16), 16, 4, 2, 4)
    assert logcnt.tolist() == [[1] * 16]
    assert imbalance(torch.ones(1, 16), phy2log, 4).tolist() == [1.0]


def test_imbalance_by_hand():
    loads = torch.tensor([[6.0, 1.0, 1.0]])
    assert imbalance(loads, torch.tensor([[0, 1, 0, 2]]), 2).tolist() == [1.0]
    assert imbalance(loads, torch.tensor([[0, 0, 1, 2]]), 2).tolist() == [1.5]
    assert imbalance(torch.zeros(1, 4), torch.arange(4)[None], 2).tolist() == [1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((11, 4, 2, 8), "11 replicas are fewer than the 12 experts"),
        ((16, 5, 1, 8), "5 groups do not divide the 12 experts"),
        ((16, 4, 2, 7), "2 nodes do not divide the 7 devices"),
        ((16, 4, 2, 6), "6 devices do not divide the 16 replicas"),
    ],
)
def test_numbers_that_do_not_divide(arguments: tuple[int, int, int, int], message: str):
    with pytest.raises(UserError, match=message):
        rebalance_experts(EXAMPLE, *arguments)
