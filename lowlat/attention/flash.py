"""Flash attention over packed sequences without a KV cache, for training.

Owns the choice of kernels: the native ones on the CPU in bf16, otherwise PyTorch's
scaled_dot_product_attention. Memory is linear in the length of a sequence.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.ops import native_training_kernels
from lowlat.ops.autograd import causal_attention
from lowlat.ops.layout import EntryLayout
from lowlat.ops.mla import expand_entries
from lowlat.ops.sparse_attention import IndexQueries, choose_tokens, sparse_mla


class FlashAttention(AttentionBackend):
    """Concatenated sequences of the given lengths, each from position 0; no token attends to
    another sequence. Neighbours of equal length share one kernel call.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._ends = torch.tensor(self.lengths).cumsum(0)
        self._chosen: list[Tensor] = []
        """Positions that each sequence's queries attend to, of the last layer that chose (DSA)."""

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
        k, v = expand_entries(entries, w_uk, w_uv)
        return self._attend(torch.cat([q_nope, q_rope], dim=-1), k, v, scale, None)

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
        keys, rows = entries[:, :-width], entries[:, -width:].contiguous()
        if index is not None:
            ends = self._ends.tolist()
            spans = [
                slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)
            ]
            self._chosen = [choose_tokens(index.rows(own), keys[own], start=0) for own in spans]
        assert len(self._chosen) == len(self.lengths), "no layer has chosen tokens"
        if not any(map(len, self._chosen)):
            return self.mla(layer, q_nope, q_rope, rows, w_uk, w_uv, scale)

        def dense(nope: Tensor, rope: Tensor, seen: Tensor, *up: Tensor, **_: float) -> Tensor:
            return FlashAttention([len(nope)]).mla(layer, nope, rope, seen, up[0], up[1], scale)

        parts = (x.split(self.lengths) for x in (q_nope, q_rope, rows))
        return torch.cat(
            [
                sparse_mla(nope, rope, own, w_uk, w_uv, chosen, start=0, scale=scale, dense=dense)
                for nope, rope, own, chosen in zip(*parts, self._chosen, strict=True)
            ]
        )

    def gqa(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        return self._attend(q, k, v, scale, window)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        layout: EntryLayout,
        scale: float,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        return self.gqa(layer, q, *layout.expand(entries), scale, None)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Float[Tensor, "tokens heads v_dim"]:
        is_full = window is None or window >= max(self.lengths)
        if is_full and q.dtype == torch.bfloat16 and native_training_kernels.usable(q, k, v):
            return causal_attention(q, k, v, self._ends, scale)
        v_dim = v.shape[-1]
        # The kernels take one head width. Padding v with zeros adds zeros, which are cut off.
        width = max(q.shape[-1], v_dim)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        # (count, length) of neighbouring sequences of equal length.
        runs = [(len(list(group)), length) for length, group in groupby(self.lengths)]
        sizes = [count * length for count, length in runs]
        outputs = []
        for run, *parts in zip(runs, *(x.split(sizes) for x in (q, k, v)), strict=True):
            batched = [x.unflatten(0, run).transpose(1, 2) for x in parts]
            out = _causal(batched[0], batched[1], batched[2], scale, window)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined[..., :v_dim]


def _causal(
    q: Float[Tensor, "sequences heads length width"],
    k: Float[Tensor, "sequences kv_heads length width"],
    v: Float[Tensor, "sequences kv_heads length width"],
    scale: float,
    window: int | None,
) -> Float[Tensor, "sequences heads length width"]:
    length, shared = q.shape[2], q.shape[1] != k.shape[1]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=shared
        )
    at = torch.arange(length, device=q.device)
    behind = at[:, None] - at
    seen = (behind >= 0) & (behind < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=shared)
