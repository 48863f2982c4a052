"""Attention path of new tokens: decode (GEMV), absorbed MLA or expanded MLA.

Owns the three paths and the choice among them. The bits of a token's KV cache entry depend on the
path, not on the batch composition or on the cuts of chunked prefill. So the prefill planner chooses
the path from the request alone, and the prefix cache shares entries only of equal paths. Imports no
torch.
"""

from typing import Literal

from lowlat.config.attention import DECOUPLED_ROPE, ModelAttention, distinct, expansion_break_even

AttentionPath = Literal["decode", "absorbed", "expanded"]
"""decode: few tokens, matrix-vector products (GEMV) bound by weight bandwidth, attention in the
latent space (MLA, GLA, GTA), over factors (TPA) or over keys and values (GQA); absorbed: matrix
products (GEMM), attention in the latent space; expanded: matrix products, attention over keys and
values, which all but GQA build once per head and key."""

DECODE_TOKENS = 32
"""Up to this many new tokens of a sequence, a step is bound by weight bandwidth."""


def choose_path(attention: ModelAttention, length: int) -> AttentionPath:
    """The fastest path for `length` new tokens of one sequence; the same path for all layers, also
    where their attention differs.
    """
    if length <= DECODE_TOKENS:
        return "decode"
    latent = [layer for layer in distinct(attention) if isinstance(layer, DECOUPLED_ROPE)]
    return "absorbed" if latent and length <= expansion_break_even(latent) else "expanded"
