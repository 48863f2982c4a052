"""Attention metadata of one step: which tokens of which sequences, and their KV cache slots."""

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
    """Pages of the sequence in order (block table in vLLM), covering at least start + length
    entries."""
    start: int
    """Tokens of the sequence that are cached already."""
    length: int
    """New tokens in this step, at least 1."""
    path: AttentionPath = "decode"
    """The attention path that computes them."""
    lora_int_id: int = 0
    """The LoRA adapter that computes them; 0: none."""

    @property
    def context(self) -> int:
        """Length of the sequence after the step (seq_len in vLLM)."""
        return self.start + self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBatch:
    """The concatenated tokens of one step, without padding (varlen attention). Built once per step
    and used by every layer."""

    sequences: tuple[SequenceSlice, ...]
    positions: Int[Tensor, "tokens"]
    """Position of each token in its sequence."""
    slots: Int[Tensor, "tokens"]
    """Slot of each token's entry in a layer's cache (slot_mapping in vLLM): page * page_size +
    offset."""

    @classmethod
    def build(
        cls,
        sequences: Sequence[SequenceSlice],
        *,
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "AttentionBatch":
        """Positions and slots of the step. Every sequence's pages must cover its context."""
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
