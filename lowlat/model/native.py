"""The native form of a model: its weights, where they lie, put together for one call per step.

Owns which models have a native form. Arithmetic is csrc/'s; the modules beside this file say what
it computes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.metadata import AttentionBatch
from lowlat.model.block import DecoderLayer
from lowlat.model.gqa import GQA
from lowlat.model.linear import Linear, RMSNorm
from lowlat.model.mla import MLA
from lowlat.model.moe import MLP, Gate, MoE
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from lowlat.utils.memory import is_larger_than_memory

BLOCK = (128, 128)
"""Rows and columns of the fp8 blocks the kernels know."""
TILE = 16
"""Rows of a tile."""
STREAM_ROWS = 128
"""Up to so many tokens of a step, reading the weights is most of the time."""


def has_native_form(model: Transformer) -> bool:
    """Whether the kernels are here and can run `model`: on the CPU, with bf16 activations, every
    projection bf16, int8, int4 or fp8 in blocks of 128.
    """
    embedding = model.embed_tokens.weight
    if embedding.device.type != "cpu" or embedding.dtype != torch.bfloat16:
        return False
    if not all(_is_known(module) for module in model.modules()):
        return False
    native.warn_if_absent()
    return native.available()


def weight_bytes(model: Transformer) -> int:
    """Bytes of all parameters, mapped or not."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _is_known(module: torch.nn.Module) -> bool:
    if isinstance(module, Gate):
        return module.weight.dtype == torch.bfloat16
    if not isinstance(module, Linear):
        return True
    if module.storage == "plain":
        return module.weight.dtype == torch.bfloat16
    return module.storage != "fp8" or module.block == BLOCK


class NativeModel:
    """Runs the decoder layers of a Transformer that `has_native_form`. MTP modules stay with it."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.rotary = model.rotary
        self._has_integers = any(
            isinstance(part, Linear) and part.storage in ("int8", "int4")
            for part in model.modules()
        )
        module = native.module()
        native.keep_torch_single_threaded()
        embedding = model.embed_tokens.weight.detach()
        head = _matrix(embedding) if model.lm_head is None else _weight(model.lm_head)
        self._model = module.Model(
            embedding=embedding,
            layers=[_layer(layer) for layer in model.layers if isinstance(layer, DecoderLayer)],
            norm=_norm(model.norm),
            head=module.Projection.make(head, None),
            is_larger_than_memory=is_larger_than_memory(weight_bytes(model)),
        )

    def step(
        self,
        ids: Int[Tensor, "tokens"],
        batch: AttentionBatch,
        cache: PagedCache,
        wanted: list[int],
    ) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "wanted vocab"]]:
        """Cache the rows of new tokens; their hidden states after the final norm (bf16), and the
        logits (fp32) of the tokens numbered in `wanted`.

        A sequence gets the same bits in any company. int8 and int4 weights are multiplied otherwise
        by streams, so that a step that mixes them with other forms is two calls, streams last.
        """
        kinds = [item.form == "stream" for item in batch.sequences]
        if not self._has_integers:
            # Bits are the same either way: what counts is the number of rows.
            kinds = [len(ids) <= STREAM_ROWS] * len(kinds)
        hidden = torch.empty(len(ids), self.config.hidden_size, dtype=torch.bfloat16)
        logits = torch.empty(len(wanted), self.config.vocab_size)
        if len(set(kinds)) == 1:
            self._call(ids, batch, cache, wanted, kinds[0], hidden, logits)
            return hidden, logits
        for kind in (False, True):
            tokens, part = _part(batch, kinds, kind)
            chosen = [row for row, token in enumerate(wanted) if token in tokens]
            rows = [tokens[wanted[row]] for row in chosen]
            own_hidden = hidden.new_empty(len(tokens), hidden.shape[1])
            own_logits = logits.new_empty(len(rows), logits.shape[1])
            self._call(ids[list(tokens)], part, cache, rows, kind, own_hidden, own_logits)
            hidden[list(tokens)], logits[chosen] = own_hidden, own_logits
        return hidden, logits

    def _call(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        cache: PagedCache,
        wanted: list[int],
        is_stream: bool,
        hidden: Tensor,
        logits: Tensor,
    ) -> None:
        """One step of sequences of one kind, written into `hidden` and `logits`."""
        cos, sin = self.rotary(batch.positions)
        sequences = [
            (item.pages, item.start, item.length, item.form == "expanded")
            for item in batch.sequences
        ]
        self._model.step(
            ids=ids,
            slots=batch.slots,
            cos=cos,
            sin=sin,
            sequences=sequences,
            cache=cache.data,
            quantized=cache.quantized,
            hidden=hidden,
            wanted=wanted,
            logits=logits,
            is_stream=is_stream,
        )


def _part(
    batch: AttentionBatch, kinds: list[bool], kind: bool
) -> tuple[dict[int, int], AttentionBatch]:
    """The sequences of one kind: where each of their tokens of the step is in the part, and the
    part.
    """
    tokens: dict[int, int] = {}
    first = 0
    for item, own in zip(batch.sequences, kinds, strict=True):
        if own == kind:
            tokens |= {first + i: len(tokens) + i for i in range(item.length)}
        first += item.length
    index = torch.tensor(list(tokens), dtype=torch.int64)
    sequences = tuple(item for item, own in zip(batch.sequences, kinds, strict=True) if own == kind)
    part = AttentionBatch(
        sequences=sequences, positions=batch.positions[index], slots=batch.slots[index]
    )
    return tokens, part


# The return types below are inferred: those of the native module have no names of their own.
def _layer(layer: DecoderLayer):
    module = native.module()
    mlp = layer.mlp
    return module.Layer.make(
        input_norm=_norm(layer.input_layernorm),
        post_attention_norm=_norm(layer.post_attention_layernorm),
        attention=_mla(layer.self_attn)
        if isinstance(layer.self_attn, MLA)
        else _gqa(layer.self_attn),
        mlp=_dense(mlp.shared_experts if isinstance(mlp, MoE) else mlp),
        moe=_moe(mlp) if isinstance(mlp, MoE) else None,
    )


def _mla(attention: MLA):
    dims = attention.dims
    has_query_latent = dims.q_lora_rank is not None
    # In exactly converted models most rows of W_Q are zero: whole tiles of them are skipped.
    q = attention.q_b_proj if has_query_latent else attention.q_proj
    return native.module().Attention.mla(
        heads=dims.num_attention_heads,
        nope_dim=dims.qk_nope_head_dim,
        rope_dim=dims.qk_rope_head_dim,
        value_dim=dims.v_head_dim,
        scale=attention.scale,
        interleave=attention.interleave,
        q_a=_projection(attention.q_a_proj) if has_query_latent else None,
        q_a_norm=_norm(attention.q_a_layernorm) if has_query_latent else None,
        q=_projection(q, sparse=not dims.kv_a_layernorm),
        kv_a=_projection(attention.kv_a_proj_with_mqa),
        kv_a_norm=_norm(attention.kv_a_layernorm) if dims.kv_a_layernorm else None,
        kv_b=_weight(attention.kv_b_proj),
        o=_projection(attention.o_proj),
    )


def _gqa(attention: torch.nn.Module):
    assert isinstance(attention, GQA)
    dims = attention.dims
    return native.module().Attention.gqa(
        heads=dims.num_attention_heads,
        kv_heads=dims.num_key_value_heads,
        head_dim=dims.head_dim,
        scale=attention.scale,
        interleave=attention.interleave,
        window=attention.window or 0,
        q=_projection(attention.q_proj),
        k=_projection(attention.k_proj),
        v=_projection(attention.v_proj),
        o=_projection(attention.o_proj),
        q_norm=_norm(attention.q_norm) if dims.qk_norm else None,
        k_norm=_norm(attention.k_norm) if dims.qk_norm else None,
    )


def _dense(mlp: torch.nn.Module | None):
    if mlp is None:
        return None
    assert isinstance(mlp, MLP)
    return native.module().Mlp.make(
        _projection(mlp.gate_proj), _projection(mlp.up_proj), _projection(mlp.down_proj)
    )


def _moe(mlp: MoE):
    moe = mlp.gate.moe
    is_v2_single = not moe.scale_after_norm and moe.num_experts_per_tok == 1
    normalizes = moe.norm_topk_prob and not is_v2_single
    has_groups = moe.topk_method != "greedy"
    router = native.module().Router.make(
        _matrix(mlp.gate.weight),
        _numbers(mlp.gate.e_score_correction_bias),
        chosen=moe.num_experts_per_tok,
        groups=moe.n_group if has_groups else 1,
        kept_groups=moe.topk_group if has_groups else 1,
        best_in_group=2 if moe.topk_method == "noaux_tc" else 1,
        is_sigmoid=moe.scoring_func == "sigmoid",
        normalizes=normalizes,
        scaling=1.0 if normalizes and not moe.scale_after_norm else moe.routed_scaling_factor,
    )
    return native.module().Moe.make(router, [_dense(expert) for expert in mlp.experts])


def _norm(norm: RMSNorm):
    return native.module().Norm.make(_numbers(norm.weight), norm.eps)


def _projection(linear: Linear, *, sparse: bool = False):
    return native.module().Projection.make(_weight(linear, sparse=sparse), _numbers(linear.bias))


def _numbers(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().float().contiguous()


def _weight(linear: Linear, *, sparse: bool = False):
    matrix = native.module().Matrix
    weight = linear.weight.detach()
    occupied = _occupied(linear) if sparse else None
    size = {"rows": linear.out_features, "columns": linear.in_features}
    match linear.storage:
        case "plain":
            return _matrix(weight, occupied)
        case "fp8":
            return matrix.fp8(weight.view(torch.uint8), linear.weight_scale_inv, occupied=occupied)
        case "int8":
            return matrix.int8(weight, linear.weight_scale, **size, occupied=occupied)
        case "int4":
            scale, minimum = linear.weight_scale, linear.weight_minimum
            return matrix.int4(weight, scale, minimum, **size, occupied=occupied)
        case "int8_rows":
            return matrix.int8_rows(weight, linear.weight_scale, occupied=occupied)


def _matrix(weight: Tensor, occupied: Tensor | None = None):
    return native.module().Matrix.bf16(weight.detach(), occupied=occupied)


def _occupied(linear: Linear) -> Tensor:
    """Per tile of 16 rows, 1 where a weight is not zero."""
    rows = linear.dense_weight(torch.float32).ne(0).any(dim=1)
    padded = torch.zeros(-(-len(rows) // TILE) * TILE, dtype=torch.bool)
    padded[: len(rows)] = rows
    return padded.view(-1, TILE).any(dim=1).to(torch.uint8)
