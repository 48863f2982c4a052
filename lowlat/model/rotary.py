"""Rotary tables of all layers of a model.

Owns where a layer's pairs are in them; frequencies and angles are `ops.rope`'s.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.ops.rope import RotaryTables, rotary_tables


class LayerRotary:
    """cos and sin of any positions. Layers with the same frequencies share a table; tables that
    differ lie side by side and are made at once, so that a step's cost hardly grows with them.
    """

    def __init__(self, config: ModelConfig) -> None:
        kinds: dict[object, int] = {}
        parts: list[RotaryTables] = []
        self._first: list[int] = []
        self._pairs: list[int] = []
        total = 0
        for layer in range(config.num_cache_layers):
            rope, dim = config.rope_of(layer), config.attention_of(layer).rope_dim
            if (rope, dim) not in kinds:
                kinds[rope, dim] = total
                parts.append(RotaryTables(rope, dim))
                total += dim // 2
            self._first.append(kinds[rope, dim])
            self._pairs.append(dim // 2)
        self.inverse = torch.cat([part.inverse for part in parts])
        self._magnitude = torch.cat(
            [torch.full_like(part.inverse, part.magnitude) for part in parts]
        )

    def __call__(
        self, positions: Int[Tensor, "tokens"]
    ) -> tuple[Float[Tensor, "tokens pairs"], Float[Tensor, "tokens pairs"]]:
        """fp32 cos and sin of every table, side by side: what `of` cuts a layer's own from."""
        return rotary_tables(positions, self.inverse, self._magnitude.to(positions.device))

    def of(self, layer: int, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The part of `tables` (as called) that `layer` rotates by; MTP modules are numbered after
        the decoder layers.
        """
        first = self._first[layer]
        last = first + self._pairs[layer]
        cos, sin = tables
        return cos[:, first:last], sin[:, first:last]

    def first_pair(self, layer: int) -> int:
        """Where the columns of `layer` begin."""
        return self._first[layer]
