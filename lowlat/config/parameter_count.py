"""Parameter counts of a model by part, from its configuration alone.

Counts are exact integers of what released checkpoints hold, router biases and norms included. KV
cache sizes are in `kv_cache_size`, bytes of weights in `weight_memory`, FLOPs in `plan.flops`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from lowlat.config.attention import computed_heads
from lowlat.config.model import (
    AttentionConfig,
    GLAConfig,
    GQAConfig,
    GTAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    TPAConfig,
)

ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one number by dtype."""

FP32_BYTES = 4


class Matrices(NamedTuple):
    """`number` matrices [rows, columns]; `is_rows` is true of kv_b_proj."""

    number: int
    rows: int
    columns: int
    is_rows: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of a model by part. MTP modules are counted apart from the main model."""

    embedding: int
    """Input embedding; also the head where the two are tied."""
    head: int
    """Output head; 0 where it is the embedding."""
    attention: int
    """Attention projections and latent norms of all decoder layers."""
    dense_mlp: int
    """MLPs of the layers without experts."""
    shared_experts: int
    """Shared experts of all expert layers."""
    routed_experts: int
    """Routed experts of all expert layers."""
    gate: int
    """Router weights and selection biases of all expert layers."""
    norms: int
    """Norms on the residual stream."""
    inactive_experts: int
    """Part of routed_experts that a token does not use."""
    mtp: int
    """MTP modules without their copies of embedding and head."""
    mtp_copies: int
    """Copies of embedding and head in the MTP modules of released checkpoints."""

    @property
    def total(self) -> int:
        """Main model, without MTP."""
        experts = self.shared_experts + self.routed_experts + self.gate
        layers = self.attention + self.dense_mlp + experts + self.norms
        return self.embedding + self.head + layers

    @property
    def active(self) -> int:
        """Parameters of the main model one token uses, the whole input embedding counted."""
        return self.total - self.inactive_experts

    @property
    def active_without_embedding(self) -> int:
        """As `active`, without the input embedding; a tied head stays: a token uses all of it."""
        return self.active - (self.embedding if self.head else 0)


def num_stored_parameters(config: ModelConfig) -> int:
    """Parameters of a checkpoint: the main model, its MTP modules, and their copies if stored."""
    count = count_parameters(config)
    return count.total + count.mtp + (count.mtp_copies if config.mtp_copies else 0)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of `config` by part."""
    layers, moe = config.num_hidden_layers, config.moe
    sparse = sum(config.is_moe_layer(layer) for layer in range(layers))
    embedding = config.vocab_size * config.hidden_size
    expert = shared = routed = unused = gate = 0
    has_output_norm = moe is not None and moe.output_norm
    if moe is not None:
        expert, gate = expert_parameters(config), gate_parameters(config, moe)
        shared, routed = moe.n_shared_experts, moe.n_routed_experts
        unused = routed - moe.num_experts_per_tok
    return ParameterCount(
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
        attention=sum(attention_parameters(config, layer) for layer in range(layers)),
        dense_mlp=(layers - sparse) * mlp_parameters(config, config.intermediate_size),
        shared_experts=sparse * expert * shared,
        routed_experts=sparse * expert * routed,
        gate=sparse * gate,
        norms=(2 * layers + 1 + sparse * has_output_norm) * config.hidden_size,
        inactive_experts=sparse * expert * unused,
        mtp=sum(mtp_parameters(config, layers + k) for k in range(config.num_nextn_predict_layers)),
        mtp_copies=2 * embedding * config.num_nextn_predict_layers,
    )


def attention_parameters(config: ModelConfig, layer: int) -> int:
    """Attention of `layer` (MTP modules after the last): projections, biases and norms."""
    attention, hidden = config.attention_of(layer), config.hidden_size
    matrices = attention_matrices(attention, hidden)
    return sum(m.rows * m.columns for m in matrices) + _unquantized(attention, hidden)


def attention_matrices(attention: AttentionConfig, hidden: int, layers: int = 1) -> list[Matrices]:
    """The projections of `layers` layers of attention on `hidden` channels, but for weights_proj of
    indexers, which is never quantized.
    """
    heads = attention.num_attention_heads
    queries, values = heads * attention.qk_head_dim, heads * attention.v_head_dim
    shapes, latent = [], None
    match attention:
        case GQAConfig():
            keys = attention.num_key_value_heads * attention.head_dim
            shapes = [(queries, hidden), (keys, hidden), (keys, hidden)]
        case GTAConfig():
            shapes = [(queries, hidden), (attention.entry_dim, hidden)]
        case TPAConfig():
            width, rank = attention.head_dim, attention.q_rank
            ranks = (rank, attention.k_rank, attention.v_rank)
            factors = [own * size for own in ranks if own is not None for size in (heads, width)]
            outputs = [queries, *factors] if rank is None else factors
            shapes = [(rows, hidden) for rows in outputs]
        case MLAConfig() | GLAConfig():
            rank = attention.q_lora_rank
            shapes = [(queries, hidden)] if rank is None else [(rank, hidden), (queries, rank)]
            shapes.append((attention.kv_a_dim, hidden))
            is_mla = isinstance(attention, MLAConfig)
            latent = attention.kv_lora_rank if is_mla else attention.group_rank
            if is_mla and attention.attn_output_gate:
                shapes.append((values, hidden))
            if is_mla and (width := attention.index_key_dim):
                assert attention.indexer is not None
                rows = attention.indexer.index_n_heads * width
                shapes += [(rows, rank or hidden), (width, hidden)]
    matrices = [Matrices(layers, *shape) for shape in (*shapes, (hidden, values))]
    if latent is not None:
        assert isinstance(attention, MLAConfig | GLAConfig)
        rows = computed_heads(attention) * (attention.qk_nope_head_dim + attention.v_head_dim)
        matrices.append(Matrices(layers, rows, latent, is_rows=True))
    return matrices


def mlp_parameters(config: ModelConfig, width: int) -> int:
    """A SwiGLU MLP with `width` hidden channels: gate, up and down projection."""
    return 3 * config.hidden_size * width


def expert_parameters(config: ModelConfig) -> int:
    """One routed or shared expert."""
    assert config.moe is not None
    return mlp_parameters(config, config.moe.moe_intermediate_size)


def gate_parameters(config: ModelConfig, moe: MoEConfig) -> int:
    """One layer's router: a row per expert and, with noaux_tc, a selection bias per expert."""
    bias = moe.n_routed_experts if moe.has_router_bias else 0
    return moe.n_routed_experts * config.hidden_size + bias


def moe_parameters(config: ModelConfig, moe: MoEConfig) -> int:
    """One layer's experts, shared and routed, and their router."""
    experts = moe.n_routed_experts + moe.n_shared_experts
    return experts * expert_parameters(config) + gate_parameters(config, moe)


def mtp_parameters(config: ModelConfig, layer: int) -> int:
    """MTP module stored as `layer`: eh_proj, a decoder layer with its norms, three more norms."""
    hidden, moe = config.hidden_size, config.moe
    if moe is not None and config.is_moe_layer(layer):
        mlp = moe_parameters(config, moe)
    else:
        mlp = mlp_parameters(config, config.intermediate_size)
    return 2 * hidden * hidden + attention_parameters(config, layer) + mlp + 5 * hidden


def _unquantized(attention: AttentionConfig, hidden: int) -> int:
    """Biases and norms of an attention layer, and weights_proj of its indexer."""
    queries = attention.num_attention_heads * attention.qk_head_dim
    match attention:
        case GQAConfig():
            biases = (queries + attention.entry_dim) * attention.qkv_bias
            norms = 2 * attention.head_dim * attention.qk_norm
            return biases + hidden * attention.o_bias + norms
        case MLAConfig():
            norm = attention.kv_lora_rank * attention.kv_a_layernorm
            has_o_bias = attention.attention_bias or attention.o_bias
            biases = attention.kv_a_dim * attention.attention_bias + hidden * has_o_bias
            rank = attention.q_lora_rank
            queries = queries * attention.q_bias if rank is None else rank
            query_bias = (rank or 0) * attention.attention_bias
            return norm + biases + queries + query_bias + _indexer_unquantized(attention, hidden)
        case GLAConfig():
            return attention.kv_lora_rank + (attention.q_lora_rank or 0)
        case GTAConfig() | TPAConfig():
            return 0


def _indexer_unquantized(attention: MLAConfig, hidden: int) -> int:
    """Weight and bias of k_norm, and weights_proj."""
    if attention.indexer is None or attention.indexer.is_shared:
        return 0
    return 2 * attention.indexer.index_head_dim + attention.indexer.index_n_heads * hidden
