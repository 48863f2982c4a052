"""What one step computes: which tokens of which sequences, and where their rows live in
the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lowlat.attention.path import AttentionPath


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSlice:
    """New tokens of one sequence: positions start .. start + length - 1."""

    pages: tuple[int, ...]
    """Pages of the sequence in order, covering at least start + length rows."""
    start: int
    """Tokens of the sequence that are cached already."""
    length: int
    """New tokens in this step, at least 1."""
    path: AttentionPath = "decode"
    """The arithmetic that computes them."""

    @property
    def context(self) -> int:
        """Rows the last new token attends to."""
        return self.start + self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBatch:
    """The tokens of one step, sequence after sequence. Built once per step and read by
    every layer.
    """

    sequences: tuple[SequenceSlice, ...]
    positions: Int[Tensor, "tokens"]
    """Position of each token in its sequence."""
    slots: Int[Tensor, "tokens"]
    """Row of each token in a layer's cache: page * page_size + offset."""

    @classmethod
    def build(
        cls,
        sequences: Sequence[SequenceSlice],
        *,
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "AttentionBatch":
        """Lay out the step. Every sequence's pages must cover its context."""
        positions: list[int] = []
        slots: list[int] = []
        for item in sequences:
            assert item.length > 0 and len(item.pages) * page_size >= item.context
            for position in range(item.start, item.context):
                positions.append(position)
                slots.append(item.pages[position // page_size] * page_size + position % page_size)
        return cls(
            sequences=tuple(sequences),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
        )
