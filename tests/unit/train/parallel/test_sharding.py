"""Shards of tensors: every entry in one shard, and the full tensor from all shards."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.parallel.sharding import Shard, Sharding


def sharding(size: int, place: int, shape: tuple[int, ...], *shards: Shard) -> Sharding:
    axes = {shard.axis for shard in shards}
    mesh = Mock(spec=ProcessMesh)
    mesh.size.side_effect = dict.fromkeys(axes, size).__getitem__
    mesh.local_rank.side_effect = dict.fromkeys(axes, place).__getitem__
    return Sharding(mesh, torch.Size(shape), shards)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(
    ("shape", "shard"),
    [
        ((7, 3), Shard(axis="fsdp", dim=0)),
        ((2, 3), Shard(axis="fsdp", dim=0)),
        ((3, 30), Shard(axis="tensor", dim=1)),
        ((5, 60, 3), Shard(axis="tensor", dim=1, blocks=2)),
    ],
)
def test_shards_make_the_full_tensor(
    size: int, shape: tuple[int, ...], shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer rows than processes too, where some have none."""
    whole = torch.randn(shape)
    shardings = [sharding(size, place, shape, shard) for place in range(size)]
    pieces = [one.local(whole) for one in shardings]
    assert sum(piece.numel() for piece in pieces) == whole.numel()
    sent: list[torch.Tensor] = []

    def all_gather(parts: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        sent.append(mine)
        for part, given in zip(parts, given_by_all, strict=False):
            part.copy_(given)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    given_by_all: list[torch.Tensor] = []
    for one, piece in zip(shardings, pieces, strict=True):
        one.full(piece)
    given_by_all = sent[:]
    for one, piece in zip(shardings, pieces, strict=True):
        assert torch.equal(one.full(piece), whole)


def test_blocks_are_each_divided() -> None:
    """Gate rows and up rows: a process has the same channels of both."""
    whole = torch.arange(12.0)[None, :, None].expand(2, 12, 3)
    own = sharding(3, 1, (2, 12, 3), Shard(axis="tensor", dim=1, blocks=2)).local(whole)
    assert own[0, :, 0].tolist() == [2.0, 3.0, 8.0, 9.0]


def test_a_second_shard_divides_the_first() -> None:
    shards = Shard(axis="expert", dim=0), Shard(axis="expert_fsdp", dim=0)
    own = sharding(2, 1, (8, 3), *shards).local(torch.arange(24.0).view(8, 3))
    assert own[:, 0].tolist() == [18.0, 21.0]


def test_whole_matrices_of_a_stack_need_no_gathering() -> None:
    shards = Shard(axis="expert", dim=0), Shard(axis="tensor", dim=2)
    one = sharding(2, 0, (8, 3, 6), *shards)
    assert one.axes == ("expert", "tensor")
    assert one.within_matrices().axes == ("tensor",)
    assert sharding(2, 0, (8, 6), shards[0]).within_matrices().axes == ("expert",)
