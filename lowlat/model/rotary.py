"""Rotary position embeddings of all layers of a model, in one table: YaRN and the other frequency
rules are in `ops.rope`, the columns of each layer here.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.ops.rope import RotaryEmbedding, RotaryTable, rotary_table


class RotaryEmbeddings:
    """cos and sin of any positions. Layers with the same frequencies share columns; all columns are
    computed at once, so a step's cost hardly grows with their number.
    """

    def __init__(self, config: ModelConfig) -> None:
        kinds: dict[object, int] = {}
        parts: list[RotaryEmbedding] = []
        self._first: list[int] = []
        self._pairs: list[int] = []
        total = 0
        for layer in range(config.num_cache_layers):
            rope, dim = config.rope_of(layer), config.attention_of(layer).rope_dim
            if (rope, dim) not in kinds:
                kinds[rope, dim] = total
                parts.append(RotaryEmbedding(rope, dim))
                total += dim // 2
            self._first.append(kinds[rope, dim])
            self._pairs.append(dim // 2)
        self.inverse = torch.cat([part.inverse for part in parts])
        self._magnitude = torch.cat(
            [torch.full_like(part.inverse, part.magnitude) for part in parts]
        )

    def __call__(self, positions: Int[Tensor, "tokens"]) -> RotaryTable:
        """cos and sin of all layers' pairs, concatenated; `of` slices those of one layer."""
        return rotary_table(positions, self.inverse, self._magnitude.to(positions.device))

    def of(self, layer: int, table: RotaryTable) -> RotaryTable:
        """The columns of `table`, made by calling this, that `layer` rotates by; MTP modules are
        numbered after the decoder layers.
        """
        first = self._first[layer]
        last = first + self._pairs[layer]
        return RotaryTable(table.cos[:, first:last], table.sin[:, first:last])

    def first_pair(self, layer: int) -> int:
        """The first column of `layer`."""
        return self._first[layer]
