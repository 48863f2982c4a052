"""Packed-sequence attention without a KV cache in plain PyTorch: the reference of
`lowlat.attention.flash`, differentiable and in any dtype.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.ops.attention import causal_attention
from lowlat.ops.layout import EntryLayout
from lowlat.ops.mla import expanded_mla
from lowlat.ops.sparse_attention import IndexQueries, choose_tokens, sparse_mla


class PackedAttention(AttentionBackend):
    """Concatenated sequences of the given lengths, each from position 0; no token attends to
    another sequence.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._chosen: list[Tensor] = []

    def positions(self, device: torch.device | str = "cpu") -> Int[Tensor, "tokens"]:
        """Positions of the packed tokens."""
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])

    def mla(
        self,
        layer: int,
        q_nope: Float[Tensor, "tokens heads nope_dim"],
        q_rope: Float[Tensor, "tokens heads rope_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        w_uk: Float[Tensor, "heads nope_dim latent"],
        w_uv: Float[Tensor, "heads v_dim latent"],
        scale: float,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        parts = zip(*(x.split(self.lengths) for x in (q_nope, q_rope, entries)), strict=True)
        return torch.cat(
            [
                expanded_mla(nope, rope, own, w_uk, w_uv, start=0, scale=scale)
                for nope, rope, own in parts
            ]
        )

    def sparse_mla(
        self,
        layer: int,
        q_nope: Float[Tensor, "tokens heads nope_dim"],
        q_rope: Float[Tensor, "tokens heads rope_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        w_uk: Float[Tensor, "heads nope_dim latent"],
        w_uv: Float[Tensor, "heads v_dim latent"],
        scale: float,
        index: IndexQueries | None,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        width = w_uk.shape[-1] + q_rope.shape[-1]
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        spans = [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]
        if index is not None:
            self._chosen = [
                choose_tokens(index.rows(own), entries[own, :-width], start=0) for own in spans
            ]
        outputs = []
        for own, chosen in zip(spans, self._chosen, strict=True):
            rows = entries[own, -width:].contiguous()
            given = (q_nope[own], q_rope[own], rows, w_uk, w_uv)
            outputs.append(sparse_mla(*given, chosen, start=0, scale=scale, dense=expanded_mla))
        return torch.cat(outputs)

    def gqa(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        outputs = []
        for queries, keys, values in zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True):

            def key_values(
                first: int, last: int, keys: Tensor = keys, values: Tensor = values
            ) -> tuple[Tensor, Tensor]:
                return keys[first:last], values[first:last]

            outputs.append(
                causal_attention(queries, key_values, start=0, scale=scale, window=window)
            )
        return torch.cat(outputs)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        layout: EntryLayout,
        scale: float,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        return self.gqa(layer, q, *layout.expand(entries), scale, None)
