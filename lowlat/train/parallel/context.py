"""Context parallelism: sequences divided among processes, keys all-gathered for attention.

A sequence of T tokens is cut into two chunks per process; process i has chunks i and 2 n - 1 - i,
so that causal attention is equal work for all (zig-zag, as in Llama 3, arXiv 2407.21783 section
3.3.2). For MLA the latent KV entries are gathered, and every process expands all of them. An
all-gather takes the place of ring attention.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from lowlat.attention.base import AttentionBackend
from lowlat.data.batch import Batch
from lowlat.ops.layout import EntryLayout
from lowlat.ops.mla import expand_entries
from lowlat.train.layers.indexed_attention import KeyRange
from lowlat.train.parallel.collectives import all_gather


class QuerySpan(NamedTuple):
    """Queries of this process over one range of keys: the part of a document in one chunk."""

    row: int
    """Sequence of the batch."""
    begin: int
    """First token of the document, in the sequence."""
    first: int
    """First query, in the sequence."""
    end: int
    """After the last query, in the row."""


class Zigzag:
    """The tokens of one of `size` processes."""

    def __init__(self, size: int, place: int) -> None:
        self.size = size
        self.chunks = (place, 2 * size - 1 - place)
        """Indices of this process's two chunks among the 2 * size of a sequence."""

    def divide(self, batch: Batch, num_ahead: int) -> Batch:
        """This process's chunks of every sequence, as sequences of their own with the tokens that
        follow.
        """
        chunk = self._chunk(batch.sequence_length(num_ahead))
        tokens, loss_mask = (
            torch.stack(
                [whole[:, c * chunk : (c + 1) * chunk + num_ahead] for c in self.chunks], dim=1
            ).flatten(0, 1)
            for whole in (batch.tokens, batch.loss_mask)
        )
        return Batch(tokens=tokens, loss_mask=loss_mask)

    def pieces(self, documents: Sequence[Sequence[int]]) -> list[QuerySpan]:
        """Attention calls, in the order of this process's tokens; `documents` are the document
        lengths of each sequence.
        """
        found = []
        for row, lengths in enumerate(documents):
            chunk = self._chunk(sum(lengths))
            for place in self.chunks:
                begin = 0
                for length in lengths:
                    first = max(begin, place * chunk)
                    end = min(begin + length, (place + 1) * chunk)
                    if first < end:
                        found.append(QuerySpan(row, begin, first, end))
                    begin += length
        return found

    def whole(
        self, parts: Float[Tensor, "tokens width"], rows: int
    ) -> Float[Tensor, "rows length width"]:
        """Full sequences from the concatenated tokens of all processes."""
        width = parts.shape[-1]
        split = parts.reshape(self.size, rows, 2, -1, width)
        chunks = torch.cat([split[:, :, 0], split[:, :, 1].flip(0)])
        return chunks.transpose(0, 1).reshape(rows, -1, width)

    def _chunk(self, length: int) -> int:
        return length // (2 * self.size)


@final
class ContextAttention(AttentionBackend):
    """Attention over this process's tokens, in the order of `Zigzag.divide`."""

    def __init__(
        self, documents: Sequence[Sequence[int]], zigzag: Zigzag, group: dist.ProcessGroup
    ) -> None:
        """`documents`: lengths of the documents in each sequence (document mask)."""
        self._rows = len(documents)
        self._length = sum(documents[0])
        self._pieces = zigzag.pieces(documents)
        self._zigzag = zigzag
        self._group = group

    def positions(self, device: torch.device | str = "cpu") -> Int[Tensor, "tokens"]:
        """Positions of this process's tokens in their documents."""
        return torch.cat(
            [torch.arange(p.first - p.begin, p.end - p.begin, device=device) for p in self._pieces]
        )

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
        k, v = expand_entries(self._gathered(entries), w_uk, w_uv)
        return self._attend(torch.cat([q_nope, q_rope], dim=-1), k, v, scale, None)

    def sparse_mla(self, *arguments: Any, **named: Any) -> Tensor:
        raise AssertionError("IndexedAttention trains sparse attention")

    def key_ranges(self) -> list[KeyRange]:
        """This process's queries and their keys among those of `gather`."""
        starts = (piece.row * self._length for piece in self._pieces)
        return [
            KeyRange(start + piece.begin, start + piece.first, start + piece.end)
            for start, piece in zip(starts, self._pieces, strict=True)
        ]

    def gather(self, own: Float[Tensor, "tokens width"]) -> Float[Tensor, "all_keys width"]:
        """The keys of all processes, sequence after sequence."""
        return self._gathered(own).flatten(0, 1)

    def gqa(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        both = self._gathered(torch.cat([k, v], dim=-1).flatten(1))
        both = both.unflatten(-1, (k.shape[1], -1))
        return self._attend(q, both[..., : k.shape[2]], both[..., k.shape[2] :], scale, window)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        layout: EntryLayout,
        scale: float,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        k, v = layout.expand(self._gathered(entries).flatten(0, 1))
        k, v = (x.unflatten(0, (self._rows, -1)) for x in (k, v))
        return self._attend(q, k, v, scale, None)

    def _gathered(self, own: Float[Tensor, "tokens width"]) -> Float[Tensor, "rows length width"]:
        return self._zigzag.whole(all_gather(own, self._group), self._rows)

    def _attend(
        self,
        q: Float[Tensor, "tokens heads width"],
        k: Float[Tensor, "rows length kv_heads width"],
        v: Float[Tensor, "rows length kv_heads v_dim"],
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        v_dim = v.shape[-1]
        # Fused kernels need one head width: zero padding adds nothing and is cut off.
        width = max(q.shape[-1], v_dim)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        sizes = [piece.end - piece.first for piece in self._pieces]
        outputs = [
            _seen(
                queries,
                k[piece.row, piece.begin : piece.end],
                v[piece.row, piece.begin : piece.end],
                scale,
                window,
            )
            for piece, queries in zip(self._pieces, q.split(sizes), strict=True)
        ]
        return torch.cat(outputs)[..., :v_dim]


def _seen(
    q: Float[Tensor, "queries heads width"],
    k: Float[Tensor, "keys kv_heads width"],
    v: Float[Tensor, "keys kv_heads width"],
    scale: float,
    window: int | None,
) -> Float[Tensor, "queries heads width"]:
    """Attention of queries that are the last tokens of the keys."""
    queries, keys = q.shape[0], k.shape[0]
    shared = q.shape[1] != k.shape[1]
    if window is not None and window < keys:
        behind = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(
            keys, device=q.device
        )
        mask: Tensor | None = (behind >= 0) & (behind < window)
    else:
        mask = None if queries == keys else causal_lower_right(queries, keys)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shared
    )
    return out[0].transpose(0, 1)
