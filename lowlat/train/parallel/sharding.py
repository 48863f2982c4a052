"""Sharding of one tensor over a process mesh: this process's shard, and the full tensor back from
all shards (DTensor's `Shard` placements, with uneven and blockwise shards).
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from lowlat.train.parallel.mesh import ProcessMesh


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Placement: dimension `dim` is divided among the processes of the mesh axis `axis`.

    Every process has ceil(size / processes) entries, the last ones fewer, perhaps none (as
    torch.chunk and FSDP2 divide).
    """

    axis: str
    dim: int
    blocks: int = 1
    """Equal blocks of the dimension that are each divided: 2 where gate rows precede up rows."""


@final
class Sharding:
    """The placements of one tensor; each divides what the previous one left."""

    def __init__(
        self, mesh: ProcessMesh, shape: torch.Size, shards: tuple[Shard, ...] = ()
    ) -> None:
        """`shape` is that of the full tensor."""
        self.mesh = mesh
        self.shape = shape
        self.shards = tuple(shard for shard in shards if mesh.size(shard.axis) > 1)

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes whose processes have different shards."""
        return tuple(dict.fromkeys(shard.axis for shard in self.shards))

    def local(self, full: Tensor) -> Tensor:
        """This process's shard of `full`, a view where possible."""
        for shard in self.shards:
            size, rank = self.mesh.size(shard.axis), self.mesh.local_rank(shard.axis)
            blocks = _in_blocks(full, shard)
            first, count = _extent(blocks.shape[shard.dim + 1], size, rank)
            full = blocks.narrow(shard.dim + 1, first, count).flatten(shard.dim, shard.dim + 1)
        return full

    def full(self, local: Tensor) -> Tensor:
        """The full tensor, of which every process passes its shard: all-gathers over `axes`."""
        shape = list(self.shape)
        lengths = []
        for shard in self.shards:
            lengths.append(shape[shard.dim])
            size, rank = self.mesh.size(shard.axis), self.mesh.local_rank(shard.axis)
            _, count = _extent(shape[shard.dim] // shard.blocks, size, rank)
            shape[shard.dim] = shard.blocks * count
        for shard, length in zip(reversed(self.shards), reversed(lengths), strict=True):
            local = self._gathered(local, shard, length)
        return local

    def within_matrices(self) -> "Sharding":
        """The placements along the last two dimensions only, which divide single matrices."""
        inner = tuple(shard for shard in self.shards if shard.dim >= len(self.shape) - 2)
        return Sharding(self.mesh, self.shape, inner)

    def _gathered(self, local: Tensor, shard: Shard, length: int) -> Tensor:
        size, dim = self.mesh.size(shard.axis), shard.dim + 1
        blocks = _in_blocks(local, shard)
        per_block = length // shard.blocks
        missing = _largest(per_block, size) - blocks.shape[dim]
        if missing:
            shape = [*blocks.shape]
            shape[dim] = missing
            blocks = torch.cat([blocks, blocks.new_zeros(shape)], dim=dim)
        blocks = blocks.contiguous()
        parts = [torch.empty_like(blocks) for _ in range(size)]
        dist.all_gather(parts, blocks, group=self.mesh.group(shard.axis))
        return torch.cat(parts, dim=dim).narrow(dim, 0, per_block).flatten(shard.dim, dim)


def _in_blocks(tensor: Tensor, shard: Shard) -> Tensor:
    """`tensor` with the sharded dimension as [blocks, entries]."""
    return tensor.unflatten(shard.dim, (shard.blocks, tensor.shape[shard.dim] // shard.blocks))


def _extent(length: int, parts: int, part: int) -> tuple[int, int]:
    """Offset and length of part `part` of `length` entries."""
    most = _largest(length, parts)
    first = min(length, part * most)
    return first, min(length, first + most) - first


def _largest(length: int, parts: int) -> int:
    return -(-length // parts)
