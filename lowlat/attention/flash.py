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


class FlashAttention(AttentionBackend):
    """Concatenated sequences of the given lengths, each from position 0; no token attends to
    another sequence. Neighbours of equal length share one kernel call.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._ends = torch.tensor(self.lengths).cumsum(0)

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
        heads, _, rank = w_uk.shape
        latent, k_rope = entries[:, :rank], entries[:, None, rank:]
        k_nope = (latent @ w_uk.flatten(0, 1).T).unflatten(-1, (heads, -1))
        v = (latent @ w_uv.flatten(0, 1).T).unflatten(-1, (heads, -1))
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, heads, -1)], dim=-1)
        return self._attend(q, k, v, scale, None)

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
