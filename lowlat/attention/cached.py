"""Attention over the paged KV cache in PyTorch: stores the new entries, then attends sequence by
sequence. Reference implementation of the native kernels.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.attention.cache import PagedCache
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.ops.attention import causal_attention
from lowlat.ops.layout import EntryLayout
from lowlat.ops.mla import absorbed_mla, expanded_mla
from lowlat.ops.sparse_attention import IndexQueries, choose_tokens, sparse_mla


class CachedAttention(AttentionBackend):
    """One step of decoding or chunked prefill.

    MLA runs expanded for slices on the expanded path, absorbed for all others and over chosen
    tokens.
    """

    def __init__(self, cache: PagedCache, batch: AttentionBatch) -> None:
        self.cache = cache
        self.batch = batch
        self._chosen: list[Tensor] = []
        """Positions that each sequence's queries attend to, of the last layer that chose (DSA)."""

    @property
    def chosen(self) -> list[Int[Tensor, "sparse topk"]]:
        """Positions that each sequence's last queries attend to (`ops.sparse_attention`), of the
        last layer that chose; the queries before them attend to all tokens.
        """
        return self._chosen

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
        self.cache.write(layer, self.batch.slots, entries)
        outputs = []
        lengths = [item.length for item in self.batch.sequences]
        for item, nope, rope in zip(
            self.batch.sequences, q_nope.split(lengths), q_rope.split(lengths), strict=True
        ):
            attend = expanded_mla if item.path == "expanded" else absorbed_mla
            context = self._context(layer, item, nope.dtype)
            outputs.append(attend(nope, rope, context, w_uk, w_uv, start=item.start, scale=scale))
        return torch.cat(outputs)

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
        self.cache.write(layer, self.batch.slots, entries)
        if index is not None:
            self._chosen = []
        outputs, first = [], 0
        for number, item in enumerate(self.batch.sequences):
            own = slice(first, first + item.length)
            context = self._context(layer, item, q_nope.dtype)
            if index is not None:
                keys = self.cache.read_index_keys(layer, item.pages, item.context, q_nope.dtype)
                self._chosen.append(choose_tokens(index.rows(own), keys, start=item.start))
            outputs.append(
                sparse_mla(
                    q_nope[own],
                    q_rope[own],
                    context,
                    w_uk,
                    w_uv,
                    self._chosen[number],
                    start=item.start,
                    scale=scale,
                    dense=expanded_mla if item.path == "expanded" else absorbed_mla,
                )
            )
            first += item.length
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
        self.cache.write(layer, self.batch.slots, torch.stack([k, v], dim=1).flatten(1))
        outputs = []
        lengths = [item.length for item in self.batch.sequences]
        for item, queries in zip(self.batch.sequences, q.split(lengths), strict=True):
            # entry -> K or V x kv_heads x head_dim
            context = self._context(layer, item, q.dtype).unflatten(1, (2, *k.shape[1:]))

            def key_values(
                first: int, last: int, context: Tensor = context
            ) -> tuple[Tensor, Tensor]:
                return context[first:last, 0], context[first:last, 1]

            outputs.append(
                causal_attention(queries, key_values, start=item.start, scale=scale, window=window)
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
        self.cache.write(layer, self.batch.slots, entries)
        outputs = []
        lengths = [item.length for item in self.batch.sequences]
        for item, queries in zip(self.batch.sequences, q.split(lengths), strict=True):
            context = self._context(layer, item, q.dtype)
            if item.path == "decode":
                outputs.append(layout.attend(queries, context, start=item.start, scale=scale))
                continue

            def key_values(
                first: int, last: int, context: Tensor = context
            ) -> tuple[Tensor, Tensor]:
                return layout.expand(context[first:last])

            # One query block: a second one would expand every key again.
            outputs.append(
                causal_attention(
                    queries, key_values, start=item.start, scale=scale, query_block=item.length
                )
            )
        return torch.cat(outputs)

    def _context(
        self, layer: int, item: SequenceSlice, dtype: torch.dtype
    ) -> Float[Tensor, "keys entry_dim"]:
        return self.cache.read(layer, item.pages, item.context, dtype)
