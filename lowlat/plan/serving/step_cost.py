"""Step model of serving: bytes read and FLOPs of one step, and their time at given rates.

A step runs `queries` new tokens of each of its sequences after `context` cached ones: a decode
step, a chunk of a prompt, or a whole prompt. It reads the weights of the experts that its tokens
use and every attended KV cache entry once. Attention counts as the cheaper of absorbed and expanded
MLA; sparse attention (DSA) as the index keys of all tokens and the entries of the chosen ones. A
multiply-add is two FLOPs. Zero weights count as well, even those in zero tiles, which kernels skip
in exactly converted models.

    seconds >= max((weights + KV cache) / bandwidth,
                   FLOPs of the weights / product rate + FLOPs of attention / score rate)

A step is memory-bound if its arithmetic intensity (FLOPs per byte) is low, else compute-bound.
Reaching this bound (the roofline) requires weights to be read while attention is computed. The
serial bound is the sum of the bound of the weights and the bound of attention. It is larger if one
of them is memory-bound and the other compute-bound.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from lowlat.config.attention import computed_heads, index_key_dim, sparse_topk
from lowlat.config.kv_cache_size import EntrySize, index_key_bytes, packs_index_keys
from lowlat.config.model import (
    AttentionConfig,
    GQAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    TPAConfig,
)
from lowlat.config.parameter_count import (
    attention_parameters,
    count_parameters,
    expert_parameters,
    gate_parameters,
    mlp_parameters,
)
from lowlat.plan.serving.weights import WeightBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Tokens of one step."""

    sequences: int = 1
    queries: int = 1
    """New tokens of each sequence; 1 when decoding."""
    context: int = 0
    """Tokens of each sequence that are cached before the step."""

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return self.sequences * self.queries

    @property
    def keys(self) -> int:
        """Tokens of a sequence after the step."""
        return self.context + self.queries

    @property
    def pairs(self) -> int:
        """Query-key pairs of a sequence under the causal mask."""
        return self.queries * self.context + self.queries * (self.queries + 1) // 2

    def of_rank(self, data: int) -> "Step":
        """The step of the fullest of `data` ranks that divide the sequences."""
        return replace(self, sequences=-(-self.sequences // data))


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """The part of a model and of a step that one rank computes; by default all of it."""

    layers: range | None = None
    """Decoder layers; None for all."""
    has_head: bool = True
    tensor: int = 1
    """Ranks that divide heads and channels."""
    data: int = 1
    """Ranks that divide the sequences in attention (data-parallel attention)."""
    experts: int | float | None = None
    """Routed experts per layer that the rank reads; None for those that the tokens use."""
    choices: int | float | None = None
    """Tokens times routed experts that the rank computes per layer; None for all."""


WHOLE = RankShare()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Bytes and FLOPs of a step."""

    weight_bytes: int | float
    cache_bytes: int | float
    weight_flops: int | float
    attention_flops: int | float
    int8_flops: int | float = 0.0
    """FLOPs of attention by integer products."""


def step_cost(
    config: ModelConfig,
    step: Step,
    weights: WeightBytes,
    *,
    cache: str = "bf16",
    share: RankShare = WHOLE,
) -> StepCost:
    """The cost of one step, or of a rank's share of it. cache: data type of the KV cache."""
    layers = range(config.num_hidden_layers) if share.layers is None else share.layers
    sparse = sum(config.is_moe_layer(layer) for layer in layers)
    own, every = _shared_parameters(config, layers), _shared_parameters(config)
    used, choices = share.experts, share.choices
    if config.moe is None:
        used = choices = 0.0
    else:
        used = expected_experts(config.moe, step.tokens) if used is None else used
        choices = step.tokens * config.moe.num_experts_per_tok if choices is None else choices
    routed = expert_parameters(config) * sparse * choices if config.moe else 0.0
    head = config.vocab_size * config.hidden_size * share.has_head
    rank_step = step.of_rank(share.data)
    sequences = rank_step.sequences
    repeated = _repeated_parameters(config, layers) if share.tensor > 1 else 0
    per_rank = repeated + (own - repeated) / share.tensor
    rows = per_rank * rank_step.tokens + head / share.tensor * sequences
    attention = attention_flops(
        config, queries=step.queries, keys=step.keys, pairs=step.pairs, layers=layers
    )
    integers = _int8_flops(config, step, attention, cache=cache, layers=layers)
    all_sparse = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    return StepCost(
        weight_bytes=(
            weights.layers * (per_rank / every)
            + weights.head * share.has_head / share.tensor
            + (weights.expert * (sparse / all_sparse) * used if sparse else 0.0)
        ),
        cache_bytes=sequences * _cache_read(config, step, cache, layers, share.tensor),
        weight_flops=2.0 * (rows + routed),
        attention_flops=sequences * attention / share.tensor,
        int8_flops=sequences * integers / share.tensor,
    )


@lru_cache(maxsize=256)
def _shared_parameters(config: ModelConfig, layers: range | None = None) -> int:
    """Parameters outside routed experts, embedding and head that `layers` have; None: the model."""
    if layers is None or len(layers) == config.num_hidden_layers:
        count = count_parameters(config)
        return count.total - count.routed_experts - count.embedding - count.head
    moe, total = config.moe, 0
    for layer in layers:
        total += attention_parameters(config, layer) + 2 * config.hidden_size
        if moe is None or not config.is_moe_layer(layer):
            total += mlp_parameters(config, config.intermediate_size)
        else:
            total += expert_parameters(config) * moe.n_shared_experts
            total += gate_parameters(config, moe)
    return total


def _repeated_parameters(config: ModelConfig, layers: range) -> int:
    """Parameters of `layers` that every tensor-parallel rank has: down-projections to latents, and
    gates."""
    moe, total = config.moe, 0
    for layer in layers:
        attention = config.attention_of(layer)
        if isinstance(attention, MLAConfig):
            total += config.hidden_size * ((attention.q_lora_rank or 0) + attention.kv_a_dim)
        if moe is not None and config.is_moe_layer(layer):
            total += gate_parameters(config, moe)
    return total


def entry_bytes(
    config: ModelConfig, cache: str, layers: Iterable[int] | None = None, tensor: int = 1
) -> int | float:
    """Bytes of a token's KV cache entries in `layers` (None: all, MTP modules included) that one of
    `tensor` tensor-parallel ranks holds.
    """
    layers = range(config.num_cache_layers) if layers is None else layers
    return sum(_entry(config.attention_of(layer), cache, tensor)[0] for layer in layers)


def _entry(attention: AttentionConfig, cache: str, tensor: int) -> tuple[float, float]:
    """(bytes of a KV cache entry of one layer, bytes of the index key in it)."""
    # latents are shared by all heads, so every tensor-parallel rank has them
    parts = tensor if isinstance(attention, GQAConfig) else 1
    size = EntrySize.of(attention).num_bytes(cache) / parts
    return size, float(index_key_bytes(index_key_dim(attention), cache))


def _cache_read(config: ModelConfig, step: Step, cache: str, layers: range, tensor: int) -> float:
    """Bytes of KV cache that the queries of one sequence attend to, each entry once."""
    total = 0.0
    for (attention, window), number in _kinds(config, layers).items():
        size, index = _entry(attention, cache, tensor)
        seen, topk = step.keys, sparse_topk(attention)
        if window is not None:
            seen = min(seen, window + step.queries - 1)
        if topk is not None:
            seen = min(seen, topk * step.queries)
        # up to top-k tokens, nothing is scored
        scored = 0 if topk is None or step.keys <= topk else step.keys
        total += number * (seen * (size - index) + scored * index)
    return total


def attention_flops(
    config: ModelConfig,
    *,
    queries: int,
    keys: int,
    pairs: int | None,
    layers: range | None = None,
) -> float:
    """FLOPs of attention scores and values of one sequence over `layers` (None: all). pairs:
    query-key pairs; None: all.

    kv_b_proj of the new tokens counts among the weights; the expanded path also expands the keys
    cached before. GLA and GTA count as the latent attention that computes them.
    """
    pairs = queries * keys if pairs is None else pairs
    layers = range(config.num_hidden_layers) if layers is None else layers
    total = 0
    for (attention, window), number in _kinds(config, layers).items():
        bounds = [bound for bound in (window, sparse_topk(attention)) if bound is not None]
        seen = _pairs_within(min(bounds, default=None), queries, keys, pairs)
        one = computed_heads(attention) * _head_flops(attention, queries, keys, seen)
        total += number * (one + _index_flops(attention, queries, keys, pairs))
    return float(total)


def _index_flops(attention: AttentionConfig, queries: int, keys: int, pairs: int) -> int:
    """FLOPs of a layer's index scores, for the queries that see more than its top-k; none where it
    shares an earlier layer's choice."""
    indexer = attention.indexer if isinstance(attention, MLAConfig) else None
    if indexer is None or indexer.is_shared or keys <= indexer.index_topk:
        return 0
    start = keys - queries
    dense = max(indexer.index_topk - start, 0)
    scored = pairs - dense * start - dense * (dense + 1) // 2
    return scored * 2 * indexer.index_n_heads * indexer.index_head_dim


def _kinds(config: ModelConfig, layers: range) -> Counter[tuple[AttentionConfig, int | None]]:
    """Number of layers by attention and sliding window."""
    return Counter((config.attention_of(layer), config.window(layer)) for layer in layers)


def _pairs_within(window: int | None, queries: int, keys: int, pairs: int) -> int:
    """Query-key pairs inside a sliding window; the queries are the last of `keys` tokens."""
    if window is None:
        return pairs

    def up_to(tokens: int) -> int:
        inside = min(tokens, window)
        return inside * (inside + 1) // 2 + (tokens - inside) * window

    return min(pairs, up_to(keys) - up_to(keys - queries))


def _int8_flops(
    config: ModelConfig, step: Step, attention: float, *, cache: str, layers: range
) -> float:
    """FLOPs of the `attention` of one sequence by integer products: index scores unless the cache
    is fp32 or fp64; in an int8 cache all scores and values of one query, save over channels in
    bf16.
    """
    if cache == "int8" and step.queries == 1:
        plain = 0
        for (kind, window), number in _kinds(config, layers).items():
            bounds = [bound for bound in (window, sparse_topk(kind)) if bound is not None]
            seen = min([step.keys, *bounds])
            plain += number * seen * (kind.entry_dim - kind.quantized_dim)
        return attention - 2.0 * config.num_attention_heads * plain
    if not packs_index_keys(cache):
        return 0.0
    return float(
        sum(
            number * _index_flops(kind, step.queries, step.keys, step.pairs)
            for (kind, _), number in _kinds(config, layers).items()
        )
    )


def _head_flops(attention: AttentionConfig, queries: int, keys: int, pairs: int) -> int:
    """FLOPs of one head in one layer."""
    if isinstance(attention, GQAConfig):
        return pairs * 4 * attention.head_dim
    if isinstance(attention, TPAConfig):
        products = 2 * (attention.k_rank + attention.v_rank) * attention.head_dim
        expanded = pairs * 4 * attention.head_dim + keys * products
        return min(pairs * products, expanded)
    latent = attention.entry_dim - index_key_dim(attention) - attention.qk_rope_head_dim
    # Without NoPE channels the latent has values only.
    scored = latent if attention.qk_nope_head_dim else 0
    absorbed = pairs * 2 * (scored + attention.qk_rope_head_dim + latent)
    expanded = pairs * 2 * (attention.qk_head_dim + attention.v_head_dim)
    width = attention.qk_nope_head_dim + attention.v_head_dim
    expanded += (keys - queries) * 2 * latent * width
    return min(absorbed, expanded)


def expected_experts(moe: MoEConfig, tokens: int) -> float:
    """Expected number of distinct experts per layer that `tokens` tokens use, under uniform
    routing."""
    missed = (1 - moe.num_experts_per_tok / moe.n_routed_experts) ** tokens
    return moe.n_routed_experts * (1 - missed)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelRates:
    """Rates that bound the kernels of a step: peaks, or what kernels reach."""

    bandwidth: float
    """Bytes/s of memory."""
    products: float
    """FLOP/s of products with weights."""
    scores: float
    """FLOP/s of attention."""
    int8_scores: float
    """FLOP/s of attention by integer products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseBound:
    """Lower bound on the seconds of a phase of a step."""

    memory: float
    """Bytes over the memory bandwidth."""
    arithmetic: float
    """FLOPs over the rate of the phase."""

    @property
    def seconds(self) -> float:
        return max(self.memory, self.arithmetic)

    @property
    def is_memory_bound(self) -> bool:
        return self.memory >= self.arithmetic


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeBound:
    """Lower bound on the seconds of a step."""

    weights: PhaseBound
    """Products with weights."""
    attention: PhaseBound

    @property
    def overlapped(self) -> float:
        """Memory and arithmetic busy at the same time: the roofline."""
        weights, attention = self.weights, self.attention
        memory = weights.memory + attention.memory
        return max(memory, weights.arithmetic + attention.arithmetic)

    @property
    def serial(self) -> float:
        """Weights, then attention, each at its own roofline."""
        return self.weights.seconds + self.attention.seconds


def step_seconds(cost: StepCost, rates: KernelRates) -> TimeBound:
    """The lower bound on the time of a step at `rates`."""
    scores = (cost.attention_flops - cost.int8_flops) / rates.scores
    return TimeBound(
        weights=PhaseBound(
            memory=cost.weight_bytes / rates.bandwidth,
            arithmetic=cost.weight_flops / rates.products,
        ),
        attention=PhaseBound(
            memory=cost.cache_bytes / rates.bandwidth,
            arithmetic=scores + cost.int8_flops / rates.int8_scores,
        ),
    )
