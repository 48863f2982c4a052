"""FLOPs per token by part of the model: projections, attention scores, MLPs, experts, head.

A multiply-add is two FLOPs. Attention is causal and in the expanded form of training: a query
attends to (T + 1) / 2 keys on average. Only the routed experts of a token count. Norms, softmax and
other elementwise operations are omitted.
"""

from dataclasses import dataclass
from functools import lru_cache

from lowlat.config.attention import (
    AttentionConfig,
    GLAConfig,
    GQAConfig,
    GTAConfig,
    MLAConfig,
    TPAConfig,
    computed_heads,
)
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import expert_parameters, mlp_parameters
from lowlat.plan.job import ActivationCheckpointing

LAYER_PARTS = ("attention", "scores", "dense MLP", "routed", "shared", "router")
"""Parts of decoder layers: projections and scores of attention, MLPs, experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardFlops:
    """Forward FLOPs of a token by precision."""

    products: float = 0.0
    """Projections of attention, MLPs and experts, in the recipe's precision."""
    plain: float = 0.0
    """Router, eh_proj and head, never in fp8."""
    scores: float = 0.0
    """Attention scores and weighted values."""

    @property
    def total(self) -> float:
        return self.products + self.plain + self.scores

    def __add__(self, other: "ForwardFlops") -> "ForwardFlops":
        return ForwardFlops(
            products=self.products + other.products,
            plain=self.plain + other.plain,
            scores=self.scores + other.scores,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFlops:
    """FLOPs per token."""

    parts: dict[str, float]
    """Forward FLOPs by part."""
    recomputed: float
    """FLOPs recomputed in the backward pass (activation checkpointing)."""

    @property
    def forward(self) -> float:
        return sum(self.parts.values())

    @property
    def training(self) -> float:
        """Forward and backward FLOPs, 3x forward, without recomputation: the model FLOPs of MFU."""
        return 3 * self.forward

    @property
    def executed(self) -> float:
        """`training` plus recomputation."""
        return self.training + self.recomputed


@lru_cache(maxsize=64)
def token_flops(
    config: ModelConfig, sequence_length: int, checkpointing: ActivationCheckpointing = "none"
) -> TokenFlops:
    """FLOPs per token of `config` in sequences of T tokens, MTP modules included."""
    parts: dict[str, float] = dict.fromkeys(LAYER_PARTS, 0.0)
    layers = range(config.num_hidden_layers)
    for layer in layers:
        for part, flops in _layer_parts(config, layer, sequence_length).items():
            parts[part] += flops
    parts["head"] = head_flops(config)
    parts["MTP"] = sum(
        mtp_work(config, depth, sequence_length).total
        for depth in range(config.num_nextn_predict_layers)
    )
    again = sum(
        recomputed_work(config, layer, sequence_length, checkpointing).total
        for layer in range(config.num_cache_layers)
    )
    return TokenFlops(parts=parts, recomputed=again)


@lru_cache(maxsize=4096)
def layer_work(config: ModelConfig, layer: int, sequence_length: int) -> ForwardFlops:
    """Forward work of a token in decoder layer `layer`; MTP's are numbered after the others."""
    parts = _layer_parts(config, layer, sequence_length)
    scores, router = parts.pop("scores"), parts.pop("router", 0.0)
    return ForwardFlops(products=sum(parts.values()), plain=router, scores=scores)


@lru_cache(maxsize=64)
def mtp_work(config: ModelConfig, depth: int, sequence_length: int) -> ForwardFlops:
    """Forward work of a token in MTP module `depth`, its pass through the head included."""
    layer = layer_work(config, config.num_hidden_layers + depth, sequence_length)
    return layer + ForwardFlops(plain=2.0 * 2 * config.hidden_size**2 + head_flops(config))


def head_flops(config: ModelConfig) -> float:
    """Forward FLOPs of a token in the head."""
    return 2.0 * config.vocab_size * config.hidden_size


def recomputed_work(
    config: ModelConfig, layer: int, sequence_length: int, checkpointing: ActivationCheckpointing
) -> ForwardFlops:
    """Work that the backward pass of decoder layer `layer` recomputes."""
    if checkpointing == "full":
        return layer_work(config, layer, sequence_length)
    if checkpointing == "selective":
        return ForwardFlops(products=2.0 * up_projections(config.attention_of(layer)))
    return ForwardFlops()


def up_projections(attention: AttentionConfig) -> int:
    """Parameters of up-projections from latents to queries, keys and values; 0 without latents."""
    match attention:
        case MLAConfig():
            latent = attention.kv_lora_rank
        case GLAConfig():
            latent = attention.group_rank
        case _:
            return 0
    keys_values = attention.qk_nope_head_dim + attention.v_head_dim
    queries = (attention.q_lora_rank or 0) * attention.qk_head_dim
    expanded = computed_heads(attention) * latent * keys_values
    return attention.num_attention_heads * queries + expanded


def attention_products(attention: AttentionConfig, hidden: int) -> int:
    """Multiply-adds per token in one layer's projections, without norms and biases; with TPA also
    the products of its factors.
    """
    heads = attention.num_attention_heads
    queries = heads * attention.qk_head_dim
    outputs = heads * attention.v_head_dim
    inner = up_projections(attention)
    match attention:
        case MLAConfig() | GLAConfig():
            queries = attention.q_lora_rank or queries
            if isinstance(attention, MLAConfig) and attention.attn_output_gate:
                outputs *= 2
        case TPAConfig():
            queries = heads * attention.head_dim
            ranks = attention.k_rank + attention.v_rank
            if attention.q_rank is not None:
                queries = attention.q_rank * (heads + attention.head_dim)
                ranks += attention.q_rank
            inner = ranks * heads * attention.head_dim
        case GQAConfig() | GTAConfig():
            pass
    return hidden * (queries + attention.entry_dim + outputs) + inner


def average_keys(sequence_length: int, window: int | None) -> float:
    """Mean number of keys that a query attends to."""
    seen = sequence_length if window is None else min(window, sequence_length)
    pairs = seen * (seen + 1) / 2 + (sequence_length - seen) * seen
    return pairs / sequence_length


def _layer_parts(config: ModelConfig, layer: int, sequence_length: int) -> dict[str, float]:
    attention, moe = config.attention_of(layer), config.moe
    width = attention.qk_head_dim + attention.v_head_dim
    keys = average_keys(sequence_length, config.window(layer))
    parts = {
        "attention": 2.0 * attention_products(attention, config.hidden_size),
        "scores": 2.0 * computed_heads(attention) * width * keys,
    }
    if moe is None or not config.is_moe_layer(layer):
        return parts | {"dense MLP": 2.0 * mlp_parameters(config, config.intermediate_size)}
    expert = 2.0 * expert_parameters(config)
    return parts | {
        "routed": expert * moe.num_experts_per_tok,
        "shared": expert * moe.n_shared_experts,
        "router": 2.0 * moe.n_routed_experts * config.hidden_size,
    }
