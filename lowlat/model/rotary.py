"""Rotary position embeddings of all layers of a model, in one table: YaRN and the other frequency
rules are in `ops.rope`, the columns of each layer here.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.ops.rope import RotaryEmbedding, RotaryTable, query_scale, rotary_table


class RotaryEmbeddings:
    """cos and sin of any positions. Layers with the same frequencies share columns; all columns are
    computed at once, so a step's cost hardly grows with their number.

    context: most tokens of a sequence, by default all that the model allows; it decides between
    the short and long factors of longrope.
    """

    def __init__(self, config: ModelConfig, context: int | None = None) -> None:
        served = config.max_position_embeddings if context is None else context
        kinds: dict[object, int] = {}
        parts: list[RotaryEmbedding] = []
        self._first: list[int] = []
        self._pairs: list[int] = []
        total = 0
        for layer in range(config.num_cache_layers):
            rope = config.rope_of(layer).for_context(served)
            dim = config.attention_of(layer).rope_dim
            if (rope, dim) not in kinds:
                kinds[rope, dim] = total
                parts.append(RotaryEmbedding(rope, dim))
                total += dim // 2
            self._first.append(kinds[rope, dim])
            self._pairs.append(dim // 2)
        rope = config.rope_of(0)
        self._query_beta = rope.llama_4_scaling_beta
        self._original_context = rope.original_max_position_embeddings or served
        self.inverse = torch.cat([part.inverse for part in parts])
        self._magnitude = torch.cat(
            [torch.full_like(part.inverse, part.magnitude) for part in parts]
        )

    def __call__(self, positions: Int[Tensor, "tokens"]) -> RotaryTable:
        """cos and sin of all layers' pairs, concatenated; `of` slices those of one layer."""
        table = rotary_table(positions, self.inverse, self._magnitude.to(positions.device))
        if self._query_beta == 0.0:
            return table
        return table._replace(
            query_scale=query_scale(positions, self._query_beta, self._original_context)
        )

    def of(self, layer: int, table: RotaryTable) -> RotaryTable:
        """The columns of `table`, made by calling this, that `layer` rotates by; MTP modules are
        numbered after the decoder layers.
        """
        first = self._first[layer]
        last = first + self._pairs[layer]
        return RotaryTable(table.cos[:, first:last], table.sin[:, first:last], table.query_scale)

    def first_pair(self, layer: int) -> int:
        """The first column of `layer`."""
        return self._first[layer]
