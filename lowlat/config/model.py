"""ModelConfig: frozen dataclasses with Hugging Face's field names, and derived sizes.

Attention variants are in `attention`. Owns no file format: config.json is read by `hf.reader` and
written by `hf.writer`, GGUF metadata by `checkpoint.gguf`. Every other layer takes these objects
and never looks at raw dictionaries.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from lowlat.config.attention import (
    DECOUPLED_ROPE,
    AttentionConfig,
    GLAConfig,
    GQAConfig,
    GTAConfig,
    IndexerConfig,
    MLAConfig,
    ModelAttention,
    TPAConfig,
    distinct,
    indexer_problem,
)

__all__ = [
    "AttentionConfig",
    "GLAConfig",
    "GQAConfig",
    "GTAConfig",
    "IndexerConfig",
    "MLAConfig",
    "MLPLayerType",
    "MoEConfig",
    "ModelAttention",
    "ModelConfig",
    "Packing",
    "QuantConfig",
    "RopeConfig",
    "RopeType",
    "TPAConfig",
    "yarn_mscale",
]

RopeType = Literal["default", "linear", "llama3", "yarn", "longrope"]
MLPLayerType = Literal["dense", "sparse"]
"""A layer with a dense MLP, or with experts."""
Packing = Literal["int8", "int4"]
"""Quantized storage: dtypes to which projections may be packed (`model.quant`); not sequence
packing (`data.packing`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding: frequencies, their scaling, layout of the rotated channels."""

    rope_theta: float
    """Base of the frequencies: pair i turns by rope_theta ** (-2 i / dim) per position."""
    rope_type: RopeType = "default"
    """How the frequencies are scaled for long contexts."""
    rope_interleave: bool = False
    """Pairs are channels (2i, 2i+1) if true, (i, i + dim/2) if false."""
    factor: float = 1.0
    """Context extension factor s (linear, llama3, yarn); with mscale_all_dim also of the softmax
    scale.
    """
    original_max_position_embeddings: int | None = None
    """Context before extension (llama3, yarn, longrope)."""
    beta_fast: float = 32.0
    """YaRN: pairs with more rotations than this over the original context are not interpolated."""
    beta_slow: float = 1.0
    """YaRN: pairs with fewer rotations than this are interpolated fully."""
    truncate: bool = True
    """YaRN: round the borders of the ramp to whole pairs."""
    mscale: float | None = None
    """YaRN: numerator of the cos/sin factor, m(mscale) / m(mscale_all_dim)."""
    mscale_all_dim: float | None = None
    """Softmax scale is multiplied by m(mscale_all_dim)^2, m(a) = 0.1 a ln(factor) + 1; also the
    denominator above.
    """
    attention_factor: float | None = None
    """Explicit cos/sin factor; derived from the fields above when absent."""
    low_freq_factor: float | None = None
    """llama3: longer wavelengths than original context / low_freq_factor are divided by factor."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor do not
    change."""
    llama_4_scaling_beta: float = 0.0
    """Queries at position p are multiplied by 1 + beta ln(1 + floor(p /
    original_max_position_embeddings)) (mistral4).
    """
    pair_factors: tuple[float, ...] | None = None
    """longrope: one divisor per pair (short_factor; also long_factor, if that is equal)."""
    long_pair_factors: tuple[float, ...] | None = None
    """longrope: the divisors instead, if the served context exceeds
    original_max_position_embeddings; None: the same.
    """

    def for_context(self, context: int) -> "RopeConfig":
        """These settings for sequences of up to `context` tokens. The choice between two sets of
        factors is made once, for all sequences, so that the rotation of a cached key is final.
        """
        if self.long_pair_factors is None:
            return self
        original = self.original_max_position_embeddings
        is_long = original is not None and context > original
        factors = self.long_pair_factors if is_long else self.pair_factors
        return replace(self, pair_factors=factors, long_pair_factors=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """DeepSeekMoE: shared experts, routed experts and the rule that chooses among them."""

    n_routed_experts: int
    """Routed experts N_r per layer."""
    num_experts_per_tok: int
    """Routed experts K_r a token uses."""
    n_shared_experts: int
    """Shared experts (fused into one MLP of n_shared_experts * moe_intermediate_size); may be 0."""
    moe_intermediate_size: int
    """Hidden width of one expert."""
    first_k_dense_replace: int
    """Leading layers with a dense MLP instead."""
    moe_layer_freq: int = 1
    """After the dense layers, layers whose number this divides are MoE."""
    mlp_layer_types: tuple[MLPLayerType, ...] | None = None
    """Kind of every decoder layer, in an order that the two fields above cannot express; None:
    they decide. MTP modules then are MoE.
    """
    scoring_func: Literal["softmax", "sigmoid"] = "sigmoid"
    """Gate: softmax (V2) or sigmoid (V3), in fp32."""
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    """Selection: by score, by score in the best groups, or by biased score in them (V3)."""
    n_group: int = 1
    """Groups the experts are divided into."""
    topk_group: int = 1
    """Groups a token may use."""
    norm_topk_prob: bool = True
    """Chosen scores are divided by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights of the routed experts."""
    scale_after_norm: bool = True
    """The factor applies to normalised weights, too (V3), or only to others (V2)."""
    router_bias: bool = True
    """noaux_tc: experts have selection biases; without them, as in mistral4, all are zero."""
    output_norm: bool = False
    """RMSNorm on the sum of shared and routed experts (axk1)."""

    @property
    def has_router_bias(self) -> bool:
        """Whether the gate has e_score_correction_bias."""
        return self.topk_method == "noaux_tc" and self.router_bias


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """Weights stored as fp8-e4m3 with one fp32 scale per block (V3 report section 3.3; ragged edges
    on a ceil grid).
    """

    weight_block_size: tuple[int, int] = (128, 128)
    """Rows and columns of a block."""
    scale_fmt: str | None = None
    """'ue8m0' where scales are powers of two (V3.1)."""
    modules_to_not_convert: tuple[str, ...] = ()
    """Names of modules that stay in high precision, as config.json lists them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of one of the supported families.

    Layers of MLA may differ in their sizes and rotary settings: then `attention`, `rope` or both
    are tuples with an entry per decoder layer (one object if all are equal, so that equal models
    have equal configs). Code that computes a layer calls `attention_of`, `rope_of` and
    `softmax_scale_of`.
    """

    model_type: str
    """Family, one of `hf.families.ARCHITECTURES`, or lowlat for models that none of these can
    express.
    """
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Hidden width of the dense MLP."""
    num_hidden_layers: int
    """Decoder layers, MTP modules not counted."""
    vocab_size: int
    """Rows of the embedding."""
    max_position_embeddings: int
    """Longest context in tokens."""
    rms_norm_eps: float
    """Epsilon of the norms on the residual stream."""
    attention: ModelAttention
    """The attention of every layer, or of each; all have the same number of heads."""
    rope: RopeConfig | tuple[RopeConfig, ...]
    """Rotary embedding of every layer, or of each."""
    moe: MoEConfig | None = None
    """Mixture of experts; None for dense models."""
    quantization: QuantConfig | None = None
    """Storage of the projections in fp8 blocks; None for other storage."""
    packing: Packing | None = None
    """Quantized storage: dtype of the packed projections; None for other storage."""
    num_nextn_predict_layers: int = 0
    """MTP modules D; stored as layers num_hidden_layers, num_hidden_layers + 1, ..."""
    mtp_copies: bool = False
    """MTP layers have their own copies of embedding and head; set by the loader."""
    tie_word_embeddings: bool = False
    """The head is the embedding matrix."""
    sliding_window: int | None = None
    """A query sees at most this many keys, itself included; None sees all."""
    sliding_window_layers: tuple[int, ...] | None = None
    """Layers the window applies to; None for every layer."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights."""
    scale_emb: float = 1.0
    """Factor on the embedding (minicpm3)."""
    scale_depth: float | None = None
    """What a layer adds to the residual stream is multiplied by scale_depth /
    sqrt(num_hidden_layers); None: by 1 (minicpm3).
    """
    dim_model_base: int | None = None
    """The head's input is multiplied by dim_model_base / hidden_size; None: by 1 (minicpm3)."""
    bos_token_id: int | None = None
    """Begin-of-sequence token."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a generation."""

    def __post_init__(self) -> None:
        for name in ("attention", "rope"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                continue
            if len(value) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(value)} layers, not {self.num_hidden_layers}")
            if len(set(value)) == 1:
                object.__setattr__(self, name, value[0])
        types = None if self.moe is None else self.moe.mlp_layer_types
        if types is not None and len(types) != self.num_hidden_layers:
            raise ValueError(
                f"mlp_layer_types has {len(types)} layers, not {self.num_hidden_layers}"
            )
        layers = distinct(self.attention)
        differs = isinstance(self.attention, tuple) or isinstance(self.rope, tuple)
        if differs and not all(isinstance(layer, MLAConfig) for layer in layers):
            raise ValueError("only layers of MLA may differ")
        if len({layer.num_attention_heads for layer in layers}) > 1:
            raise ValueError("layers differ in their number of heads")
        if problem := indexer_problem(self.attention):
            raise ValueError(f"indexer {problem}")

    def for_context(self, context: int) -> "ModelConfig":
        """This model for sequences of up to `context` tokens: without indexers, where attention
        then is dense.
        """
        if not self.is_sparse:
            return self
        layers = (self.attention_of(layer) for layer in range(self.num_hidden_layers))
        within = tuple(a.within(context) for a in layers if isinstance(a, MLAConfig))
        return replace(self, attention=within)

    @property
    def is_sparse(self) -> bool:
        """Whether a layer attends to the tokens that an indexer chooses (DSA)."""
        layers = distinct(self.attention)
        return any(isinstance(layer, MLAConfig) and layer.indexer is not None for layer in layers)

    @property
    def num_cache_layers(self) -> int:
        """Layers with KV cache entries: decoder layers, then MTP modules."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of every layer."""
        return distinct(self.attention)[0].num_attention_heads

    def attention_of(self, layer: int) -> AttentionConfig:
        """The attention of decoder layer `layer`. MTP modules, numbered after them, have that of
        the last, whose output they continue, always with an indexer of their own.
        """
        if not isinstance(self.attention, tuple):
            return self.attention
        if layer < self.num_hidden_layers:
            return self.attention[layer]
        last = self.attention[-1]
        if last.indexer is None:
            return last
        return replace(last, indexer=replace(last.indexer, is_shared=False))

    def choosing_layer(self, layer: int) -> int | None:
        """The layer whose indexer chooses the tokens that `layer`, numbered as above, attends to:
        itself, or with a shared choice one before it. None with dense attention.
        """
        attention = self.attention_of(layer)
        if not isinstance(attention, MLAConfig) or attention.indexer is None:
            return None
        return self.choosing_layer(layer - 1) if attention.indexer.is_shared else layer

    def layer_units(self) -> list[range]:
        """Runs of decoder layers that stay in one process: a layer that attends to the tokens that
        another one chose (sparse attention) follows it.
        """
        layers = self.num_hidden_layers
        starts = [n for n in range(layers) if self.choosing_layer(n) in (None, n)]
        return [range(first, last) for first, last in pairwise((*starts, layers))]

    def rope_of(self, layer: int) -> RopeConfig:
        """The rotary embedding of `layer`, numbered as above."""
        if not isinstance(self.rope, tuple):
            return self.rope
        return self.rope[min(layer, self.num_hidden_layers - 1)]

    def softmax_scale_of(self, layer: int) -> float:
        """Factor on query-key products: head width ** -0.5 times m(mscale_all_dim)^2 of YaRN."""
        attention, rope = self.attention_of(layer), self.rope_of(layer)
        scale = attention.qk_head_dim**-0.5
        if not isinstance(attention, DECOUPLED_ROPE) or rope.rope_type == "default":
            return scale
        return scale * yarn_mscale(rope.factor, rope.mscale_all_dim or 0.0) ** 2

    @property
    def residual_scale(self) -> float:
        """Factor on what attention and MLP add to the residual stream."""
        depth = self.scale_depth
        return 1.0 if depth is None else depth / math.sqrt(self.num_hidden_layers)

    @property
    def output_scale(self) -> float:
        """Factor on the final hidden state."""
        return 1.0 if self.dim_model_base is None else self.dim_model_base / self.hidden_size

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (MTP layers after the last) is a mixture of experts."""
        moe = self.moe
        if moe is None:
            return False
        if moe.mlp_layer_types is not None:
            return layer >= self.num_hidden_layers or moe.mlp_layer_types[layer] == "sparse"
        return layer >= moe.first_k_dense_replace and layer % moe.moe_layer_freq == 0

    def window(self, layer: int) -> int | None:
        """Sliding window of `layer`, or None if it sees the whole context."""
        if self.sliding_window_layers is not None and layer not in self.sliding_window_layers:
            return None
        return self.sliding_window


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention magnitude m(mscale) = 0.1 mscale ln(factor) + 1 (1 for factor <= 1)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
