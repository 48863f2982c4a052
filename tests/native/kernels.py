"""Native kernels of single ops, with the signatures of their reference implementations. `level`
selects another instruction-set level.

A model step is one native call (lowlat/model/native.py) that runs these kernels.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import BFloat16, Float, Float32, Int32, UInt8
from torch import Tensor

from lowlat.config.kv_cache_size import int8_entry_bytes
from lowlat.config.model import MoEConfig
from lowlat.ops import native
from lowlat.ops.rope import RotaryTable
from lowlat.ops.routing import Routing
from lowlat.ops.sparse_attention import IndexQueries

if TYPE_CHECKING:
    from lowlat._native import Matrix
else:
    Matrix = Any  # the module may be absent


def linear(
    x: BFloat16[Tensor, "rows in"], matrix: Matrix, *, is_decode: bool = False, level: str = ""
) -> Float32[Tensor, "rows out"]:
    """x times the matrix transposed, in fp32; `is_decode` as in lowlat.model.native."""
    out = torch.empty(x.shape[0], matrix.rows)
    native.module().linear(matrix, x.contiguous(), out, is_decode, level)
    return out


def rms_norm(
    x: BFloat16[Tensor, "*rows dim"], weight: Float[Tensor, "dim"], eps: float, *, level: str = ""
) -> BFloat16[Tensor, "*rows dim"]:
    """Native kernel of lowlat.ops.norm.rms_norm."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    rows = rows.contiguous()
    out = torch.empty_like(rows)
    native.module().rms_norm(rows, weight.float().contiguous(), eps, out, level)
    return out.view(x.shape)


def apply_rope(
    x: BFloat16[Tensor, "tokens heads dim"],
    rope: RotaryTable,
    *,
    interleave: bool,
    level: str = "",
) -> BFloat16[Tensor, "tokens heads dim"]:
    """Native kernel of lowlat.ops.rope.apply_rope."""
    out = x.clone(memory_format=torch.contiguous_format)
    native.module().rotate(out, rope.cos.contiguous(), rope.sin.contiguous(), interleave, level)
    return out


def swiglu(
    gate: BFloat16[Tensor, "rows inner"], up: BFloat16[Tensor, "rows inner"], *, level: str = ""
) -> BFloat16[Tensor, "rows inner"]:
    """Native kernel of lowlat.ops.experts.swiglu."""
    out = torch.empty(gate.shape, dtype=gate.dtype)
    native.module().swiglu(gate.contiguous(), up.contiguous(), out, level)
    return out


def route(
    x: BFloat16[Tensor, "tokens hidden"],
    gate: BFloat16[Tensor, "experts hidden"],
    bias: Float[Tensor, "experts"] | None,
    moe: MoEConfig,
    *,
    level: str = "",
) -> Routing:
    """Native kernel of lowlat.ops.routing.route."""
    module = native.module()
    tokens, chosen = x.shape[0], moe.num_experts_per_tok
    experts = torch.empty(tokens, chosen, dtype=torch.int32)
    weights = torch.empty(tokens, chosen)
    scores = torch.empty(tokens, gate.shape[0])
    matrix = module.Matrix.bf16(gate)
    bias = None if bias is None else bias.float().contiguous()
    choice = _choice(moe)
    module.route(x.contiguous(), matrix, bias, choice, experts, weights, scores, level)
    return Routing(experts.long(), weights, scores)


def _choice(moe: MoEConfig) -> Any:
    # DeepSeek-V2's modelling file does not normalise the weight of a single expert.
    is_v2_single = not moe.scale_after_norm and moe.num_experts_per_tok == 1
    normalizes = moe.norm_topk_prob and not is_v2_single
    has_groups = moe.topk_method != "greedy"
    return native.module().RoutingRule(
        chosen=moe.num_experts_per_tok,
        groups=moe.n_group if has_groups else 1,
        kept_groups=moe.topk_group if has_groups else 1,
        best_in_group=2 if moe.topk_method == "noaux_tc" else 1,
        is_sigmoid=moe.scoring_func == "sigmoid",
        normalizes=normalizes,
        scaling=moe.routed_scaling_factor if moe.scale_after_norm or not normalizes else 1.0,
    )


def draw(
    logits: Float32[Tensor, " vocab"],
    number: float,
    *,
    temperature: int | float,
    top_k: int = 0,
    top_p: int | float = 1.0,
    min_p: int | float = 0.0,
    level: str = "",
) -> int:
    """Native kernel of lowlat.ops.sampling.draw; every level gives the same token."""
    return native.module().draw(
        logits.detach().contiguous(),
        number,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        level=level,
    )


def pack_entries(
    rows: BFloat16[Tensor, "tokens entry_dim"], quantized: int, *, level: str = ""
) -> UInt8[Tensor, "tokens entry_bytes"]:
    """Native kernel of lowlat.attention.int8_entry.pack_entries."""
    entry_bytes = int8_entry_bytes(rows.shape[1], quantized)
    packed = torch.zeros(1, len(rows), entry_bytes, dtype=torch.uint8)
    native.module().store_entries(rows.contiguous(), packed, quantized=quantized, level=level)
    return packed[0]


def store_index_keys(
    keys: BFloat16[Tensor, "tokens index_dim"], cache: Tensor, *, level: str = ""
) -> None:
    """Native kernel of lowlat.attention.index_tiles.write_int8_keys, for the first slots."""
    native.module().store_index_keys(keys, cache, level=level)


def choose_tokens(
    index: IndexQueries,
    cache: Tensor,
    pages: Int32[Tensor, " pages"],
    *,
    start: int,
    level: str = "",
) -> tuple[Float32[Tensor, "queries keys"], Int32[Tensor, "queries topk"]]:
    """Native kernels of lowlat.ops.sparse_attention: scores and choice of queries at positions
    start, start + 1, ..., each of which sees more than topk tokens. Scores after a query's own
    position have no meaning.
    """
    count, _, width = index.q.shape
    keys = start + count
    scores = torch.empty(count, -(-keys // 64) * 64)
    chosen = torch.empty(count, index.topk, dtype=torch.int32)
    native.module().choose_tokens(
        index.q.contiguous(),
        index.weights * width**-0.5,
        cache,
        pages,
        start=start,
        topk=index.topk,
        scores=scores,
        chosen=chosen,
        level=level,
    )
    return scores[:, :keys], chosen


def mla_attention(
    q: BFloat16[Tensor, "queries heads entry_dim"],
    cache: BFloat16[Tensor, "pages page_size entry_dim"]
    | UInt8[Tensor, "pages page_size entry_bytes"],
    pages: Int32[Tensor, "sequence_pages"],
    *,
    latent: int,
    start: int,
    scale: float,
    quantized: int | None = None,
    level: str = "",
) -> BFloat16[Tensor, "queries heads latent"]:
    """Causal attention of queries at start, start + 1, ... over the entries in `pages`: the key of
    every head is the entry, its value the entry's first `latent` channels. A uint8 cache holds
    entries of lowlat.attention.int8_entry with `quantized` channels in int8, by default those of
    the latent. The level avx512 rounds the same channels of a query to int8 as well, in the same
    groups of 64.
    """
    layout = native.module().EntryLayout(
        kv_heads=1, key_step=0, value_dim=latent, value_step=0, value_offset=0
    )
    if cache.dtype == torch.uint8:
        quantized = quantized or latent
    return _attention(
        q, cache, pages, layout, q.shape[2], latent, start, scale, None, level, quantized or 0
    )


def gqa_attention(
    q: BFloat16[Tensor, "queries heads head_dim"],
    cache: BFloat16[Tensor, "pages page_size entry_dim"]
    | UInt8[Tensor, "pages page_size entry_bytes"],
    pages: Int32[Tensor, "sequence_pages"],
    *,
    kv_heads: int,
    start: int,
    scale: float,
    window: int | None = None,
    level: str = "",
) -> BFloat16[Tensor, "queries heads head_dim"]:
    """Causal attention over entries [K ; V] of `kv_heads` heads each; `window` as in
    lowlat.ops.attention.causal_attention.

    A uint8 cache holds entries of lowlat.attention.int8_entry, all of whose channels are in int8.
    The level avx512 rounds queries as for `mla_attention` if the keys and values of every head
    begin at multiples of 64 channels.
    """
    dim = q.shape[2]
    entry_dim = 2 * kv_heads * dim
    quantized = entry_dim if cache.dtype == torch.uint8 else 0
    layout = native.module().EntryLayout(
        kv_heads=kv_heads, key_step=dim, value_dim=dim, value_step=dim, value_offset=kv_heads * dim
    )
    return _attention(
        q, cache, pages, layout, entry_dim, dim, start, scale, window, level, quantized
    )


def _attention(
    q: Tensor,
    cache: Tensor,
    pages: Tensor,
    layout: Any,
    entry_dim: int,
    value_dim: int,
    start: int,
    scale: float,
    window: int | None,
    level: str,
    quantized: int,
) -> Tensor:
    out = torch.empty(q.shape[0], q.shape[1], value_dim, dtype=q.dtype)
    native.module().attention(
        q.contiguous(),
        cache.view(torch.uint8),
        pages.contiguous(),
        entry_dim=entry_dim,
        quantized=quantized,
        start=start,
        scale=scale,
        window=window or 0,
        layout=layout,
        out=out,
        level=level,
    )
    return out
