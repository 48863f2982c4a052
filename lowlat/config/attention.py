"""Attention configurations: MLA with or without sparse attention (DSA), GQA, GLA, GTA, TPA, their
short names and derived sizes.

All provide heads, widths of queries and values, and the KV cache entry. A model has one of them in
every layer, or MLA with per-layer sizes. Equations are in docs/mla.md and docs/attention.md.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace


class _LatentAttention:
    """Sizes that MLA and GLA share: a cached latent, and one rotary key for all heads."""

    __slots__ = ()
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Channels of a query-key product."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_a_dim(self) -> int:
        """Rows of kv_a_proj_with_mqa: [c_t ; k_R], in GLA [c_1 ; ... ; c_g ; k_R]."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim


class _OneWidth:
    """Sizes of attention whose query, key and value heads all have head_dim channels."""

    __slots__ = ()
    head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Channels of a query-key product."""
        return self.head_dim

    @property
    def v_head_dim(self) -> int:
        """Value channels per head."""
        return self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexerConfig:
    """Lightning indexer of DeepSeek Sparse Attention (DSA, DeepSeek-V3.2 section 2.1)."""

    index_n_heads: int
    """Heads H_I of the indexer."""
    index_head_dim: int
    """Channels of an index query and of the one index key; the first index_rope_head_dim rotate."""
    index_topk: int
    """Tokens that a query attends to; up to this many, attention is dense."""
    rope_interleave: bool = False
    """Rotated pairs are channels (2i, 2i+1) if true, halves if false (V3.2), whatever MLA has."""
    is_shared: bool = False
    """The layer has no indexer: it attends to the tokens that the last indexer before it chose."""
    index_rope_head_dim: int | None = None
    """Rotary channels, at frequencies of the layer's rotary key (`model.indexer.rotary_pairs`);
    None: qk_rope_head_dim, as in all released models.
    """

    @property
    def key_dim(self) -> int:
        """Elements of the index key in a KV cache entry."""
        return 0 if self.is_shared else self.index_head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class MLAConfig(_LatentAttention):
    """Multi-head Latent Attention (DeepSeek-V2 section 2.1, DeepSeek-V3 section 2.1.1)."""

    num_attention_heads: int
    """Query heads n_h."""
    kv_lora_rank: int
    """Width d_c of the cached latent c_t."""
    q_lora_rank: int | None
    """Width d'_c of the query latent; None projects queries directly."""
    qk_nope_head_dim: int
    """Query-key channels per head without position; may be 0."""
    qk_rope_head_dim: int
    """Rotary channels d_h^R per query head and of the shared key; 0 in layers without positions."""
    v_head_dim: int
    """Value channels per head."""
    attention_bias: bool = False
    """Biases on q_a_proj, kv_a_proj_with_mqa and o_proj."""
    q_bias: bool = False
    """Bias on q_proj (only without q_lora_rank): queries of converted models that have one."""
    o_bias: bool = False
    """Bias on o_proj without attention_bias."""
    kv_a_layernorm: bool = True
    """RMSNorm on the latent. False for exactly converted models, whose latent must not be rescaled.
    """
    indexer: IndexerConfig | None = None
    """Sparse attention (DSA); None attends to all tokens."""
    attn_output_gate: bool = False
    """Gated (arXiv 2505.06708): o_proj reads the heads' output times sigmoid(g_proj x)."""

    @property
    def index_key_dim(self) -> int:
        """Elements of the index key k_I in an entry; 0 without an indexer."""
        return 0 if self.indexer is None else self.indexer.key_dim

    @property
    def entry_dim(self) -> int:
        """Cached elements per token and layer: [k_I ; c_t ; k_R]."""
        return self.index_key_dim + self.kv_a_dim

    @property
    def quantized_dim(self) -> int:
        """Leading elements of an entry that an int8 cache stores in int8: k_I and c_t, while k_R
        stays bf16. In converted models, whose k_R comes from the keys of GQA, all of the entry as
        with GQA.
        """
        rotated = self.qk_rope_head_dim if self.kv_a_layernorm else 0
        return self.entry_dim - rotated

    def within(self, context: int) -> "MLAConfig":
        """This attention for sequences of up to `context` tokens: up to index_topk of them every
        token is chosen, so it is dense.
        """
        is_dense = self.indexer is not None and context <= self.indexer.index_topk
        return replace(self, indexer=None) if is_dense else self


@dataclass(frozen=True, kw_only=True, slots=True)
class GQAConfig(_OneWidth):
    """Grouped-query attention; MHA when every head has its own keys, MQA when all share one."""

    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key-value heads (groups)."""
    head_dim: int
    """Channels of a query, key or value head."""
    qkv_bias: bool = False
    """Biases on q_proj, k_proj and v_proj."""
    o_bias: bool = False
    """Bias on o_proj."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation (qwen3)."""

    @property
    def entry_dim(self) -> int:
        """Cached elements per token and layer: [K ; V]."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def quantized_dim(self) -> int:
        """Leading elements of an entry that an int8 cache stores in int8: all of [K ; V]."""
        return self.entry_dim

    @property
    def rope_dim(self) -> int:
        return self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class GLAConfig(_LatentAttention):
    """Grouped Latent Attention (arXiv 2505.21487): MLA whose latent is divided into groups; each
    head reads one group. GLA-2 has two. With sum_groups Multi-Head Low-Rank Attention (MLRA).
    """

    num_attention_heads: int
    """Query heads; consecutive heads form a group."""
    num_latent_groups: int
    """Groups of heads, each with a latent of its own; 1 is MLA."""
    kv_lora_rank: int
    """Width d_c of the latents of all groups together."""
    q_lora_rank: int | None
    """Width of the query latent, which all heads share; None projects queries directly."""
    qk_nope_head_dim: int
    """Query-key channels per head without position; may be 0."""
    qk_rope_head_dim: int
    """Rotary channels per query head and of the one key that all groups share."""
    v_head_dim: int
    """Value channels per head."""
    sum_groups: bool = False
    """MLRA (arXiv 2603.02188): every head attends in every group, with one query; its outputs are
    summed and divided by sqrt(groups). All latents are multiplied by sqrt(hidden_size / width)."""

    @property
    def entry_dim(self) -> int:
        """Cached elements per token and layer."""
        return self.kv_a_dim

    @property
    def branches(self) -> int:
        """Attentions of a head: one, or one per group."""
        return self.num_latent_groups if self.sum_groups else 1

    @property
    def group_rank(self) -> int:
        """Width of the latent of one group."""
        return self.kv_lora_rank // self.num_latent_groups

    @property
    def quantized_dim(self) -> int:
        """Leading elements of an entry that an int8 cache stores in int8: the latents."""
        return self.kv_lora_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class GTAConfig(_OneWidth):
    """Grouped-Tied Attention (arXiv 2505.21487): one state per group of heads is its value and, in
    its leading channels, its key without position; GTA-4 has four groups.
    """

    num_attention_heads: int
    """Query heads; consecutive heads form a group."""
    num_key_value_heads: int
    """Groups, each with one tied state."""
    head_dim: int
    """Channels of a query and of a tied state, which is the value."""
    qk_rope_head_dim: int
    """Trailing channels of a query that rotate, and width of the one rotated key that all groups
    share; half of head_dim in the paper. The key's other channels are the state's leading ones.
    """

    @property
    def qk_nope_head_dim(self) -> int:
        """Channels of the tied state that serve as key."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def tied_dim(self) -> int:
        """The tied states of all groups."""
        return self.num_key_value_heads * self.head_dim

    @property
    def entry_dim(self) -> int:
        """Cached elements per token and layer: the tied states, then the rotated key."""
        return self.tied_dim + self.qk_rope_head_dim

    @property
    def quantized_dim(self) -> int:
        """Leading elements of an entry that an int8 cache stores in int8: the tied states."""
        return self.tied_dim

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class TPAConfig(_OneWidth):
    """Tensor Product Attention (arXiv 2501.06425, section 3): the keys of all heads of a token are
    a sum of outer products of head factors and channel factors; so are values and queries."""

    num_attention_heads: int
    """Heads h."""
    head_dim: int
    """Channels d_h of a query, key or value head."""
    q_rank: int | None
    """Rank of queries, the number of outer products averaged; None projects queries directly."""
    k_rank: int
    """Rank of keys, the number of outer products averaged."""
    v_rank: int
    """Rank of values, the number of outer products averaged."""

    @property
    def entry_dim(self) -> int:
        """Cached elements per token and layer: [B_K ; B_V ; A_K ; A_V], with B_K rotated."""
        return (self.k_rank + self.v_rank) * (self.num_attention_heads + self.head_dim)

    @property
    def quantized_dim(self) -> int:
        """Leading elements of an entry that an int8 cache stores in int8: all factors."""
        return self.entry_dim

    @property
    def rope_dim(self) -> int:
        return self.head_dim


AttentionConfig = MLAConfig | GQAConfig | GLAConfig | GTAConfig | TPAConfig
"""The attention of one layer."""

ModelAttention = AttentionConfig | tuple[MLAConfig, ...]
"""The attention of a model: the same in every layer, or MLA with per-layer sizes."""

DECOUPLED_ROPE = (MLAConfig, GLAConfig, GTAConfig)
"""Variants with decoupled RoPE: one rotary key, shared by all heads, carries the position."""


def expansion_break_even(layers: Iterable[MLAConfig | GLAConfig | GTAConfig]) -> float:
    """Queries per cached key beyond which expanded latent attention costs fewer multiply-adds than
    absorbed attention in all `layers` together; infinite if it never does.

    Absorbed: 2 d_c + d_R per head and pair. Expanded: d_nope + d_R + d_v per head and pair, plus
    d_c (d_nope + d_v) per head and key. About 170 for DeepSeek-V3. The latent of GLA is that of all
    groups, which the up-projections read; of GTA the tied states.
    """
    saved = build = 0
    for layer in layers:
        latent = layer.tied_dim if isinstance(layer, GTAConfig) else layer.kv_lora_rank
        expanded = layer.qk_nope_head_dim + layer.v_head_dim
        saved += 2 * latent - expanded
        build += latent * expanded
    return build / saved if saved > 0 else math.inf


def distinct(attention: ModelAttention) -> tuple[AttentionConfig, ...]:
    """The configs that occur: one for all layers, or one per layer in order."""
    return attention if isinstance(attention, tuple) else (attention,)


def uniform(attention: ModelAttention) -> AttentionConfig | None:
    """The attention of every layer, of which some may share a choice (DSA); None if layers differ
    otherwise. The one returned shares none.
    """
    layers = {_unshared(layer) for layer in distinct(attention)}
    return layers.pop() if len(layers) == 1 else None


def _unshared(attention: AttentionConfig) -> AttentionConfig:
    if not isinstance(attention, MLAConfig) or attention.indexer is None:
        return attention
    return replace(attention, indexer=replace(attention.indexer, is_shared=False))


def indexer_problem(attention: ModelAttention) -> str | None:
    """Why the indexers of the layers do not fit together; None if they do."""
    layers = [layer for layer in distinct(attention) if isinstance(layer, MLAConfig)]
    indexers = [layer.indexer for layer in layers if layer.indexer is not None]
    if indexers and indexers[0].is_shared:
        return "is shared in a layer before which no layer has chosen"
    if len({replace(indexer, is_shared=False) for indexer in indexers}) > 1:
        return "differs between layers in more than is_shared"
    return None


def computed_heads(attention: AttentionConfig) -> int:
    """Heads that attention computes: with MLRA those of every branch."""
    branches = attention.branches if isinstance(attention, GLAConfig) else 1
    return attention.num_attention_heads * branches


def index_key_dim(attention: AttentionConfig) -> int:
    """Elements of the index key in an entry; 0 without an indexer."""
    return attention.index_key_dim if isinstance(attention, MLAConfig) else 0


def sparse_topk(attention: ModelAttention) -> int | None:
    """Tokens that a query attends to with sparse attention (DSA); None for dense attention."""
    layers = [layer for layer in distinct(attention) if isinstance(layer, MLAConfig)]
    return next((layer.indexer.index_topk for layer in layers if layer.indexer), None)


def short_name(attention: ModelAttention) -> str:
    """The form in a few words: 'MLA 512 + 64', 'MLA 96-224 + 16-64' where layers differ; with the
    index key 'DSA 512 + 64 + 128'.
    """
    match attention:
        case MLAConfig() | tuple():
            latent, rotary = entry_widths(attention)
            layers = attention if isinstance(attention, tuple) else (attention,)
            gated = "gated " if any(layer.attn_output_gate for layer in layers) else ""
            if sparse_topk(attention) is None:
                return f"{gated}MLA {latent} + {rotary}"
            index = _span([layer.index_key_dim for layer in layers])
            return f"{gated}DSA {latent} + {rotary} + {index}"
        case GLAConfig():
            groups, rank = attention.num_latent_groups, attention.group_rank
            name = f"MLRA-{groups}" if attention.sum_groups else f"GLA-{groups}"
            return f"{name}, {groups} x {rank} + {attention.qk_rope_head_dim}"
        case GTAConfig():
            groups, width = attention.num_key_value_heads, attention.head_dim
            return f"GTA-{groups}, {groups} x {width} + {attention.qk_rope_head_dim}"
        case TPAConfig():
            return f"TPA, ranks {attention.k_rank} + {attention.v_rank}"
        case GQAConfig():
            groups = attention.num_key_value_heads
            if groups == attention.num_attention_heads:
                return f"MHA, {groups} heads"
            return "MQA" if groups == 1 else f"GQA, {groups} groups"


def entry_widths(attention: MLAConfig | tuple[MLAConfig, ...]) -> tuple[str, str]:
    """d_c and d_R as text: '512' and '64', or from the narrowest to the widest layer, '96-224'."""
    layers = attention if isinstance(attention, tuple) else (attention,)
    return (
        _span([layer.kv_lora_rank for layer in layers]),
        _span([layer.qk_rope_head_dim for layer in layers]),
    )


def _span(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return f"{low}" if low == high else f"{low}-{high}"
