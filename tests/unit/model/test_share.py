"""Places of routed experts in processes that divide them."""

from collections import Counter

import pytest
import torch

from lowlat.model.share import ModelShare, place_experts
from lowlat.utils.errors import UserError

SHARE = ModelShare(
    layers=range(3), is_first=True, is_last=True, experts=3, expert_rank=1, redundant_experts=4
)


def test_experts_are_in_order_before_loads_are_known() -> None:
    share = ModelShare(layers=range(3), is_first=True, is_last=True, experts=2)
    assert share.expert_places(6) == [0, 1, 2, 3, 4, 5]
    places = SHARE.expert_places(11)
    assert len(places) == 15 and set(places) == set(range(11))


def test_each_process_has_as_many_places_by_ascending_expert() -> None:
    loads = torch.randint(1, 99, (5, 11), generator=torch.Generator().manual_seed(3))
    loads[2, 7] = 5000
    placed = place_experts(loads, SHARE, groups=1)
    for places in placed:
        assert len(places) == 15 and set(places) == set(range(11))
        for rank in range(3):
            own = places[rank * 5 : (rank + 1) * 5]
            assert own == sorted(own)
    assert Counter(placed[2]).most_common(1) == [(7, 5)]


def test_places_must_divide() -> None:
    share = ModelShare(layers=range(3), is_first=True, is_last=True, experts=3, redundant_experts=2)
    with pytest.raises(UserError, match="3 devices do not divide the 13 replicas"):
        place_experts(torch.ones(1, 11), share, groups=1)
