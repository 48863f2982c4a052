"""Attention paths of Multi-head Latent Attention over KV cache entries [c_t ; k_R]: expanded and
absorbed (DeepSeek-V2 section 2.1.2 and appendix C).

Expanded: k_h = [W_UK_h c ; k_R], v_h = W_UV_h c. Absorbed (weight absorption): W_UK_h moves to the
query and W_UV_h to the output, so attention reads the latent entries directly. Both give the same
numbers up to rounding; docs/mla.md derives one from the other.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.ops.attention import KEY_BLOCK, causal_attention


def expand_entries(
    entries: Float[Tensor, "*tokens entry_dim"],
    w_uk: Float[Tensor, "heads nope_dim latent"],
    w_uv: Float[Tensor, "heads v_dim latent"],
) -> tuple[Float[Tensor, "*tokens heads head_dim"], Float[Tensor, "*tokens heads v_dim"]]:
    """Keys and values of every head: k_h = [W_UK_h c ; k_R], v_h = W_UV_h c."""
    heads, _, rank = w_uk.shape
    latent, k_rope = entries[..., :rank], entries[..., None, rank:]
    k_nope = (latent @ w_uk.flatten(0, 1).T).unflatten(-1, (heads, -1))
    v = (latent @ w_uv.flatten(0, 1).T).unflatten(-1, (heads, -1))
    return torch.cat([k_nope, k_rope.expand(*k_nope.shape[:-1], -1)], dim=-1), v


def absorbed_mla(
    q_nope: Float[Tensor, "queries heads nope_dim"],
    q_rope: Float[Tensor, "queries heads rope_dim"],
    rows: Float[Tensor, "keys entry_dim"],
    w_uk: Float[Tensor, "heads nope_dim latent"],
    w_uv: Float[Tensor, "heads v_dim latent"],
    *,
    start: int,
    scale: float,
) -> Float[Tensor, "queries heads v_dim"]:
    """Absorbed MLA: all heads share one key, the entry, and one value, the latent (as in MQA)."""
    q_latent = torch.einsum("qhn,hnc->qhc", q_nope, w_uk)
    query = torch.cat([q_latent, q_rope], dim=-1)
    latent = w_uv.shape[-1]

    def key_values(first: int, last: int) -> tuple[Tensor, Tensor]:
        block = rows[first:last, None]
        return block, block[..., :latent]

    mixed = causal_attention(query, key_values, start=start, scale=scale)
    return torch.einsum("qhc,hvc->qhv", mixed, w_uv)


def expanded_mla(
    q_nope: Float[Tensor, "queries heads nope_dim"],
    q_rope: Float[Tensor, "queries heads rope_dim"],
    rows: Float[Tensor, "keys entry_dim"],
    w_uk: Float[Tensor, "heads nope_dim latent"],
    w_uv: Float[Tensor, "heads v_dim latent"],
    *,
    start: int,
    scale: float,
    key_block: int = KEY_BLOCK,
) -> Float[Tensor, "queries heads v_dim"]:
    """Expanded MLA: per-head keys and values, computed from the entries one block of keys at a
    time.
    """
    query = torch.cat([q_nope, q_rope], dim=-1)
    latent, heads = w_uv.shape[-1], w_uk.shape[0]

    # By einsum: the matrix product of `expand_entries` rounds differently, and would change bits.
    def key_values(first: int, last: int) -> tuple[Tensor, Tensor]:
        c, k_rope = rows[first:last, :latent], rows[first:last, None, latent:]
        k_nope = torch.einsum("kc,hnc->khn", c, w_uk)
        k = torch.cat([k_nope, k_rope.expand(-1, heads, -1)], dim=-1)
        return k, torch.einsum("kc,hvc->khv", c, w_uv)

    # One query block: a second one would expand every key again.
    return causal_attention(
        query,
        key_values,
        start=start,
        scale=scale,
        key_block=key_block,
        query_block=max(1, query.shape[0]),
    )
