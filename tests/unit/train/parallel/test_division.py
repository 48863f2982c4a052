"""Pieces of tensors: every entry in one piece, and the whole of the pieces again."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from lowlat.train.parallel.division import Cut, Division
from lowlat.train.parallel.team import Team


def division(size: int, place: int, shape: tuple[int, ...], *cuts: Cut) -> Division:
    axes = {cut.axis for cut in cuts}
    team = Mock(spec=Team)
    team.size.side_effect = dict.fromkeys(axes, size).__getitem__
    team.place.side_effect = dict.fromkeys(axes, place).__getitem__
    return Division(team, torch.Size(shape), cuts)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((7, 3), Cut(axis="fsdp", dim=0)),
        ((2, 3), Cut(axis="fsdp", dim=0)),
        ((3, 30), Cut(axis="tensor", dim=1)),
        ((5, 60, 3), Cut(axis="tensor", dim=1, blocks=2)),
    ],
)
def test_pieces_make_the_whole(
    size: int, shape: tuple[int, ...], cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer rows than processes too, where some have none."""
    whole = torch.randn(shape)
    divisions = [division(size, place, shape, cut) for place in range(size)]
    pieces = [one.own(whole) for one in divisions]
    assert sum(piece.numel() for piece in pieces) == whole.numel()
    sent: list[torch.Tensor] = []

    def all_gather(parts: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        sent.append(mine)
        for part, given in zip(parts, given_by_all, strict=False):
            part.copy_(given)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    given_by_all: list[torch.Tensor] = []
    for one, piece in zip(divisions, pieces, strict=True):
        one.whole(piece)
    given_by_all = sent[:]
    for one, piece in zip(divisions, pieces, strict=True):
        assert torch.equal(one.whole(piece), whole)


def test_blocks_are_each_divided() -> None:
    """Gate rows and up rows: a process has the same channels of both."""
    whole = torch.arange(12.0)[None, :, None].expand(2, 12, 3)
    own = division(3, 1, (2, 12, 3), Cut(axis="tensor", dim=1, blocks=2)).own(whole)
    assert own[0, :, 0].tolist() == [2.0, 3.0, 8.0, 9.0]


def test_a_later_cut_divides_what_an_earlier_one_left() -> None:
    cuts = Cut(axis="expert", dim=0), Cut(axis="expert_fsdp", dim=0)
    own = division(2, 1, (8, 3), *cuts).own(torch.arange(24.0).view(8, 3))
    assert own[:, 0].tolist() == [18.0, 21.0]


def test_whole_matrices_of_a_stack_need_no_gathering() -> None:
    cuts = Cut(axis="expert", dim=0), Cut(axis="tensor", dim=2)
    one = division(2, 0, (8, 3, 6), *cuts)
    assert one.axes == ("expert", "tensor")
    assert one.within_matrices().axes == ("tensor",)
    assert division(2, 0, (8, 6), cuts[0]).within_matrices().axes == ("expert",)
