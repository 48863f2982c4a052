"""Parameter counts of a model by part, from its configuration alone.

Counts are exact integers of what released checkpoints hold, router biases and norms included. KV
cache sizes are in `kv_cache_size`, bytes of weights in `weight_memory`, FLOPs in `plan.flops`.
"""

from dataclasses import dataclass

from lowlat.config.model import (
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


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of `config` by part."""
    layers, moe = config.num_hidden_layers, config.moe
    sparse = sum(config.is_moe_layer(layer) for layer in range(layers))
    embedding = config.vocab_size * config.hidden_size
    routed = 0 if moe is None else expert_parameters(config)
    return ParameterCount(
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
        attention=sum(attention_parameters(config, layer) for layer in range(layers)),
        dense_mlp=(layers - sparse) * mlp_parameters(config, config.intermediate_size),
        shared_experts=sparse * (0 if moe is None else routed * moe.n_shared_experts),
        routed_experts=sparse * (0 if moe is None else routed * moe.n_routed_experts),
        gate=sparse * (0 if moe is None else gate_parameters(config, moe)),
        norms=(2 * layers + 1) * config.hidden_size,
        inactive_experts=sparse * (0 if moe is None else routed * _unused_experts(moe)),
        mtp=sum(mtp_parameters(config, layers + k) for k in range(config.num_nextn_predict_layers)),
        mtp_copies=2 * embedding * config.num_nextn_predict_layers,
    )


def attention_parameters(config: ModelConfig, layer: int) -> int:
    """Attention of `layer` (MTP modules after the last): projections, biases, latent or per-head
    norms.
    """
    attention, hidden = config.attention_of(layer), config.hidden_size
    match attention:
        case GQAConfig():
            return _gqa_parameters(attention, hidden)
        case MLAConfig():
            return _mla_parameters(attention, hidden)
        case GLAConfig():
            return _gla_parameters(attention, hidden)
        case GTAConfig():
            queries = attention.num_attention_heads * attention.head_dim
            return hidden * (2 * queries + attention.entry_dim)
        case TPAConfig():
            return _tpa_parameters(attention, hidden)


def mlp_parameters(config: ModelConfig, width: int) -> int:
    """A SwiGLU MLP with `width` hidden channels: gate, up and down projection."""
    return 3 * config.hidden_size * width


def expert_parameters(config: ModelConfig) -> int:
    """One routed or shared expert."""
    assert config.moe is not None
    return mlp_parameters(config, config.moe.moe_intermediate_size)


def gate_parameters(config: ModelConfig, moe: MoEConfig) -> int:
    """One layer's router: a row per expert and, with noaux_tc, a selection bias per expert."""
    bias = moe.n_routed_experts if moe.topk_method == "noaux_tc" else 0
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


def _unused_experts(moe: MoEConfig) -> int:
    return moe.n_routed_experts - moe.num_experts_per_tok


def _gqa_parameters(attention: GQAConfig, hidden: int) -> int:
    queries = attention.num_attention_heads * attention.head_dim
    joint = queries + attention.entry_dim
    biases = joint * attention.qkv_bias + hidden * attention.o_bias
    norms = 2 * attention.head_dim * attention.qk_norm
    return hidden * joint + queries * hidden + biases + norms


def _mla_parameters(attention: MLAConfig, hidden: int) -> int:
    heads, latent = attention.num_attention_heads, attention.kv_lora_rank
    queries, values = heads * attention.qk_head_dim, heads * attention.v_head_dim
    keys_values = hidden * attention.entry_dim + latent * (
        heads * attention.qk_nope_head_dim + values
    )
    norm = latent * attention.kv_a_layernorm
    has_o_bias = attention.attention_bias or attention.o_bias
    biases = attention.entry_dim * attention.attention_bias + hidden * has_o_bias
    rank = attention.q_lora_rank
    if rank is None:
        query = hidden * queries + queries * attention.q_bias
    else:
        query = hidden * rank + rank * queries + rank + rank * attention.attention_bias
    return query + keys_values + norm + biases + values * hidden


def _gla_parameters(attention: GLAConfig, hidden: int) -> int:
    heads, latent = attention.num_attention_heads, attention.kv_lora_rank
    queries, values = heads * attention.qk_head_dim, heads * attention.v_head_dim
    up = attention.group_rank * (heads * attention.qk_nope_head_dim + values)
    rank = attention.q_lora_rank
    query = hidden * queries if rank is None else hidden * rank + rank * queries + rank
    return query + hidden * attention.entry_dim + latent + up + values * hidden


def _tpa_parameters(attention: TPAConfig, hidden: int) -> int:
    width = attention.num_attention_heads * attention.head_dim
    factor = attention.num_attention_heads + attention.head_dim
    queries = width if attention.q_rank is None else attention.q_rank * factor
    return hidden * (queries + attention.entry_dim + width)
