"""How one tensor is divided among processes: which piece is whose, and pieces joined again.

Owns the arithmetic of pieces; which tensor is cut how is `layout`'s.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from lowlat.train.parallel.team import Team


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One division of a tensor along `dim` among the processes of `axis`.

    Every process has ceil(size / processes) entries, the last ones fewer, perhaps none (as
    torch.chunk and FSDP2 divide).
    """

    axis: str
    dim: int
    blocks: int = 1
    """Equal blocks that the dimension consists of, each of which is divided: 2 where gate rows are
    followed by up rows.
    """


@final
class Division:
    """The cuts of one tensor, each made in what the one before left."""

    def __init__(self, team: Team, shape: torch.Size, cuts: tuple[Cut, ...] = ()) -> None:
        """`shape` is that of the whole tensor."""
        self.team = team
        self.shape = shape
        self.cuts = tuple(cut for cut in cuts if team.size(cut.axis) > 1)

    @property
    def axes(self) -> tuple[str, ...]:
        """Those whose processes have different pieces."""
        return tuple(dict.fromkeys(cut.axis for cut in self.cuts))

    def own(self, whole: Tensor) -> Tensor:
        """This process's piece, a view where the cuts allow."""
        for cut in self.cuts:
            size, place = self.team.size(cut.axis), self.team.place(cut.axis)
            blocks = _in_blocks(whole, cut)
            first, count = _extent(blocks.shape[cut.dim + 1], size, place)
            whole = blocks.narrow(cut.dim + 1, first, count).flatten(cut.dim, cut.dim + 1)
        return whole

    def whole(self, piece: Tensor) -> Tensor:
        """The tensor of which every process gives its piece; collective over `axes`."""
        shape = list(self.shape)
        lengths = []
        for cut in self.cuts:
            lengths.append(shape[cut.dim])
            _, count = _extent(
                shape[cut.dim] // cut.blocks, self.team.size(cut.axis), self.team.place(cut.axis)
            )
            shape[cut.dim] = cut.blocks * count
        for cut, length in zip(reversed(self.cuts), reversed(lengths), strict=True):
            piece = self._joined(piece, cut, length)
        return piece

    def within_matrices(self) -> "Division":
        """The cuts along the last two dimensions alone, which divide single matrices."""
        inner = tuple(cut for cut in self.cuts if cut.dim >= len(self.shape) - 2)
        return Division(self.team, self.shape, inner)

    def _joined(self, piece: Tensor, cut: Cut, length: int) -> Tensor:
        size, dim = self.team.size(cut.axis), cut.dim + 1
        blocks = _in_blocks(piece, cut)
        per_block = length // cut.blocks
        missing = _largest(per_block, size) - blocks.shape[dim]
        if missing:
            shape = [*blocks.shape]
            shape[dim] = missing
            blocks = torch.cat([blocks, blocks.new_zeros(shape)], dim=dim)
        blocks = blocks.contiguous()
        parts = [torch.empty_like(blocks) for _ in range(size)]
        dist.all_gather(parts, blocks, group=self.team.group(cut.axis))
        return torch.cat(parts, dim=dim).narrow(dim, 0, per_block).flatten(cut.dim, dim)


def _in_blocks(tensor: Tensor, cut: Cut) -> Tensor:
    """`tensor` with the cut dimension as [blocks, entries]."""
    return tensor.unflatten(cut.dim, (cut.blocks, tensor.shape[cut.dim] // cut.blocks))


def _extent(length: int, parts: int, place: int) -> tuple[int, int]:
    """Where part `place` of `length` entries begins, and how many it has."""
    most = _largest(length, parts)
    first = min(length, place * most)
    return first, min(length, first + most) - first


def _largest(length: int, parts: int) -> int:
    return -(-length // parts)
