"""Decoder layers as structs of the native kernels, which reference the weights without copies.
`native` combines them to a model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from lowlat.config.attention import computed_heads
from lowlat.model.block import DecoderLayer
from lowlat.model.gla import GLA
from lowlat.model.gqa import GQA
from lowlat.model.gta import GTA
from lowlat.model.linear import Embedding, Linear, RMSNorm
from lowlat.model.lora import LoraLinear, LowRankUpdate
from lowlat.model.mla import MLA
from lowlat.model.moe import MLP, Experts, MoE
from lowlat.model.mtp import MTPModule
from lowlat.ops import native
from lowlat.ops.gta import selectors
from lowlat.ops.quantized import TILE

COLUMNS = 32
"""Columns that a kernel reads at once."""


# The return types below are inferred: those of the native module have no names of their own.
def layer_of(layer: DecoderLayer, *, first_pair: int):
    """The native layer; `first_pair` is its first column in the rotary table."""
    module = native.module()
    mlp = layer.mlp
    return module.Layer.make(
        input_norm=norm_of(layer.input_layernorm),
        post_attention_norm=norm_of(layer.post_attention_layernorm),
        attention=_attention(layer.self_attn),
        first_pair=first_pair,
        mlp=_dense(mlp.shared_experts if isinstance(mlp, MoE) else mlp),
        moe=moe_of(mlp) if isinstance(mlp, MoE) else None,
        **_output_norm(mlp),
    )


def _output_norm(mlp: torch.nn.Module) -> dict[str, Any]:
    """The norm on the output of experts, in the few models that have one."""
    norm = mlp.post_mlp_layernorm if isinstance(mlp, MoE) else None
    return {} if norm is None else {"post_mlp_norm": norm_of(norm)}


def mtp_input_of(mtp: MTPModule):
    """Input of an MTP module: the norms of embedding and hidden state, and their projection."""
    return native.module().MtpInput.make(
        norm_of(mtp.enorm), norm_of(mtp.hnorm), projection_of(mtp.eh_proj)
    )


def _attention(attention: torch.nn.Module):
    match attention:
        case MLA():
            return _mla(attention)
        case GLA():
            return _gla(attention)
        case GTA():
            return _gta(attention)
        case GQA():
            return _gqa(attention)
    raise AssertionError(f"{type(attention).__name__} has no native kernels")


def _mla(attention: MLA):
    dims = attention.dims
    norms = [attention.kv_a_layernorm] if dims.kv_a_layernorm else []
    # In exactly converted models most rows of W_Q are zero: whole tiles of them are skipped.
    linear = attention.kv_b_proj
    kv_b, k_b = weight_of(linear), None
    if linear.weight_keys is not None:
        keys = linear.weight_keys.detach()
        rows = len(keys) if linear.keys_interleaved else None
        k_b = native.module().Matrix.gguf(keys, type=linear.keys_type, interleaved_rows=rows)
    q = attention.q_proj if dims.q_lora_rank is None else attention.q_b_proj
    projections = projection_of(q, sparse=not dims.kv_a_layernorm), projection_of(attention.o_proj)
    return _latent(attention, norms, kv_b, k_b, projections)


def _gla(attention: GLA):
    """GLA as MLA: a norm per latent; up-projections are zero outside their group's latent. MLRA has
    the heads of all branches, and o_proj sums them.
    """
    projections = _branch_projections(attention)
    return _latent(attention, attention.norms(), _spread(attention), None, projections)


def _branch_projections(attention: GLA):
    """Projections of queries, once per branch (MLRA), and of the output, with the branches' sum."""
    branches = attention.dims.branches
    q = attention.q_proj if attention.dims.q_lora_rank is None else attention.q_b_proj
    if branches == 1:
        return projection_of(q), projection_of(attention.o_proj)
    queries, output = (linear.dense_weight(torch.bfloat16) for linear in (q, attention.o_proj))
    output = (output.float() * branches**-0.5).to(torch.bfloat16)
    return _plain(queries.repeat(branches, 1)), _plain(output.repeat(1, branches))


def _plain(weight: Float[Tensor, "out in"]):
    return native.module().Projection.make(matrix_of(weight), None, updates=[])


def _latent(attention: MLA | GLA, norms: list[RMSNorm], kv_b, k_b, projections):
    """projections: q_proj (or q_b_proj) and o_proj."""
    dims = attention.dims
    has_query_latent = dims.q_lora_rank is not None
    q, o = projections
    return native.module().Attention.mla(
        heads=computed_heads(dims),
        nope_dim=dims.qk_nope_head_dim,
        rope_dim=dims.qk_rope_head_dim,
        value_dim=dims.v_head_dim,
        scale=attention.scale,
        interleave=attention.interleave,
        q_a=projection_of(attention.q_a_proj) if has_query_latent else None,
        q_a_norm=norm_of(attention.q_a_layernorm) if has_query_latent else None,
        q=q,
        kv_a=projection_of(attention.kv_a_proj_with_mqa),
        kv_a_norms=[norm_of(norm) for norm in norms],
        kv_b=kv_b,
        k_b=k_b,
        kv_b_updates=[] if isinstance(attention, GLA) else _updates(attention.kv_b_proj),
        o=o,
        **({} if isinstance(attention, GLA) else _sparse(attention)),
    )


def _sparse(attention: MLA) -> dict[str, Any]:
    """The indexer of sparse attention (DSA), or that an earlier layer's chooses."""
    own, dims = attention.indexer, attention.dims.indexer
    if dims is None:  # dense, also in a context of up to its top-k
        return {}
    if own is None:
        return {"topk": dims.index_topk, "indexer": None}
    indexer = native.module().Indexer.make(
        heads=dims.index_n_heads,
        rope_dim=own.rope_dim,
        pair_step=own.pairs.step,
        interleave=dims.rope_interleave,
        q=projection_of(own.wq_b),
        k=projection_of(own.wk),
        k_norm=native.module().Norm.make(own.k_norm.weight.detach().float(), own.k_norm.eps),
        k_norm_bias=own.k_norm.bias.detach().float(),
        weights=matrix_of(own.weights_proj.weight.detach()),
    )
    return {"topk": dims.index_topk, "indexer": indexer}


def _spread(attention: GLA):
    linear = attention.kv_b_proj
    if linear.storage == "int8_rows":
        return native.module().Matrix.int8_rows(
            attention.spread(linear.weight.detach()), linear.weight_scale
        )
    # The kernels read fp8 blocks as bf16, too.
    return matrix_of(attention.spread(linear.dense_weight(torch.bfloat16)))


def _gta(attention: GTA):
    """GTA as MLA: the latent is the tied states, the up-projections are 0 or 1, no norm."""
    dims = attention.dims
    heads, groups = dims.num_attention_heads, dims.num_key_value_heads
    up = selectors(heads, groups, dims.head_dim, dims.qk_nope_head_dim, torch.bfloat16)
    return native.module().Attention.mla(
        heads=heads,
        nope_dim=dims.qk_nope_head_dim,
        rope_dim=dims.qk_rope_head_dim,
        value_dim=dims.head_dim,
        scale=attention.scale,
        interleave=attention.interleave,
        q_a=None,
        q_a_norm=None,
        q=projection_of(attention.q_proj),
        kv_a=projection_of(attention.kv_proj_with_mqa),
        kv_a_norms=[],
        kv_b=matrix_of(torch.cat(up, dim=1).flatten(0, 1)),
        k_b=None,
        kv_b_updates=[],
        o=projection_of(attention.o_proj),
    )


def _gqa(attention: GQA):
    dims = attention.dims
    return native.module().Attention.gqa(
        heads=dims.num_attention_heads,
        kv_heads=dims.num_key_value_heads,
        head_dim=dims.head_dim,
        scale=attention.scale,
        interleave=attention.interleave,
        window=attention.window or 0,
        q=projection_of(attention.q_proj),
        k=projection_of(attention.k_proj),
        v=projection_of(attention.v_proj),
        o=projection_of(attention.o_proj),
        q_norm=norm_of(attention.q_norm) if dims.qk_norm else None,
        k_norm=norm_of(attention.k_norm) if dims.qk_norm else None,
    )


def _dense(mlp: torch.nn.Module | None):
    if mlp is None:
        return None
    assert isinstance(mlp, MLP)
    return native.module().Mlp.make(
        projection_of(mlp.gate_proj), projection_of(mlp.up_proj), projection_of(mlp.down_proj)
    )


def moe_of(mlp: MoE):
    """A router and this process's experts."""
    moe = mlp.gate.moe
    is_v2_single = not moe.scale_after_norm and moe.num_experts_per_tok == 1
    normalizes = moe.norm_topk_prob and not is_v2_single
    has_groups = moe.topk_method != "greedy"
    router = native.module().Router.make(
        matrix_of(mlp.gate.weight),
        _numbers(mlp.gate.e_score_correction_bias),
        chosen=moe.num_experts_per_tok,
        groups=moe.n_group if has_groups else 1,
        kept_groups=moe.topk_group if has_groups else 1,
        best_in_group=2 if moe.topk_method == "noaux_tc" else 1,
        is_sigmoid=moe.scoring_func == "sigmoid",
        normalizes=normalizes,
        scaling=1.0 if normalizes and not moe.scale_after_norm else moe.routed_scaling_factor,
    )
    assert isinstance(mlp.experts, Experts)
    experts = [_dense(mlp.experts[number]) for number in mlp.experts.own]
    return native.module().Moe.make(router, experts, places=mlp.experts.places)


def norm_of(norm: RMSNorm):
    """RMSNorm, its weight and constant factor in fp32."""
    weight = norm.weight.detach().float().contiguous()
    return native.module().Norm.make(weight * norm.factor, norm.eps)


def projection_of(linear: Linear, *, sparse: bool = False):
    """A linear layer and its bias."""
    return native.module().Projection.make(
        weight_of(linear, sparse=sparse), _numbers(linear.bias), updates=_updates(linear)
    )


def _updates(linear: Linear):
    """The updates of a projection by adapter, in the layout of the kernels."""
    if not isinstance(linear, LoraLinear):
        return []
    return [None if update is None else _low_rank(update) for update in linear.updates]


def _low_rank(update: LowRankUpdate):
    """A, and B transposed, in bf16 with columns that the kernels may read beyond the last one."""
    a, b = update.a.to(torch.bfloat16), update.b.T.to(torch.bfloat16)
    return native.module().LowRank.make(
        F.pad(a, (0, -a.shape[1] % COLUMNS)), F.pad(b, (0, COLUMNS + -b.shape[1] % COLUMNS))
    )


def _numbers(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().float().contiguous()


def weight_of(linear: Linear, *, sparse: bool = False):
    """The weight in its storage format; with `sparse` tiles of zeros are skipped."""
    matrix = native.module().Matrix
    weight = linear.weight.detach()
    occupied = _occupied(linear) if sparse else None
    size = {"rows": linear.out_features, "columns": linear.in_features}
    match linear.storage:
        case "plain":
            return matrix_of(weight, occupied)
        case "fp8":
            return matrix.fp8(weight.view(torch.uint8), linear.weight_scale_inv, occupied=occupied)
        case "int8":
            return matrix.int8(weight, linear.weight_scale, **size, occupied=occupied)
        case "int4":
            scale, minimum = linear.weight_scale, linear.weight_minimum
            return matrix.int4(weight, scale, minimum, **size, occupied=occupied)
        case "fp8_rows":
            values = weight.view(torch.uint8)
            return matrix.fp8_rows(values, linear.weight_scale, occupied=occupied)
        case "int8_rows":
            return matrix.int8_rows(weight, linear.weight_scale, occupied=occupied)
        case "gguf":
            rows = linear.interleaved_rows
            return matrix.gguf(
                weight, type=linear.gguf_type, interleaved_rows=rows, occupied=occupied
            )


def embedding_of(embedding: Embedding):
    """The token embedding, which may also be the head."""
    weight = embedding.weight.detach()
    if embedding.gguf_type is None:
        return matrix_of(weight)
    rows = embedding.shape[0] if embedding.is_interleaved else None
    return native.module().Matrix.gguf(weight, type=embedding.gguf_type, interleaved_rows=rows)


def matrix_of(weight: Float[Tensor, "out in"], occupied: UInt8[Tensor, "tiles"] | None = None):
    return native.module().Matrix.bf16(weight.detach(), occupied=occupied)


def _occupied(linear: Linear) -> Tensor:
    """1 for every tile of 16 rows with a nonzero weight."""
    rows = linear.dense_weight(torch.float32).ne(0).any(dim=1)
    padded = torch.zeros(-(-len(rows) // TILE) * TILE, dtype=torch.bool)
    padded[: len(rows)] = rows
    return padded.view(-1, TILE).any(dim=1).to(torch.uint8)
