"""Roofline: lower bound on the time of prefill and decode, from bytes moved and FLOPs.

    seconds >= max((weights + KV cache) / bandwidth,
                   FLOPs of the weights / GEMM rate + FLOPs of attention / GEMM rate)

Reaching this bound requires weights to be read while attention is computed. The serial bound is the
sum of the bound of the weights and the bound of attention. It is larger if one of them is
memory-bound and the other compute-bound.

Decode reads the weights of one token's experts and every attended KV cache entry once. Prefill
reads the weights of all experts that its tokens use once; with enough tokens, these are all
experts. Attention counts as the cheaper of absorbed and expanded MLA. Channels of an int8 cache
count at the int8 rate. A multiply-add is two FLOPs. Zero weights count as well, even those in zero
tiles, which kernels skip in exactly converted models.
"""

from collections import Counter
from dataclasses import dataclass

from lowlat.bench.benchmark_plan import STORED, BenchmarkCase
from lowlat.bench.stored_weights import StoredWeights
from lowlat.config.model import AttentionConfig, GQAConfig, MLAConfig, ModelConfig, TPAConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.config.weight_memory import read_bytes

RATES = {
    "fp32": "gemm_fp32",
    "bf16": "gemm_bf16",
    "fp8": "gemm_bf16",
    STORED: "gemm_bf16",
    "int8": "gemm_int8",
    "int4": "gemm_int8",
}
"""The measured rate that bounds products with weights of a dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Bytes and FLOPs of a whole prefill or of one decode step."""

    weight_bytes: float
    cache_bytes: float
    weight_flops: float
    attention_flops: float
    int8_flops: float = 0.0
    """FLOPs of attention over int8 channels of the cache."""


def step_cost(
    config: ModelConfig,
    case: BenchmarkCase,
    *,
    dtype: str,
    weights: StoredWeights | None = None,
    entry_bytes: int,
    cache: str = "bf16",
) -> StepCost:
    """The cost of one case: the whole prompt, or one decode step.

    weights: those that stay quantized as stored; None for weights of `dtype`. entry_bytes: KV cache
    of one token in all layers. cache: its number type.
    """
    count, tokens = count_parameters(config), case.tokens
    if case.kind == "prefill":
        head = config.vocab_size * config.hidden_size
        experts = _experts_used(config, tokens)
        # only the last token needs logits
        weight_flops = 2.0 * ((count.active_without_embedding - head) * tokens + head)
        queries, keys, pairs = tokens, tokens, tokens * (tokens + 1) // 2
    else:
        experts = config.moe.num_experts_per_tok if config.moe else 0
        weight_flops = 2.0 * count.active_without_embedding
        queries, keys, pairs = 1, tokens + 1, tokens + 1
    attention = attention_flops(config, queries=queries, keys=keys, pairs=pairs)
    is_int8 = case.kind == "decode" and cache == "int8"
    return StepCost(
        weight_bytes=float(
            weights.read_bytes(experts) if weights else read_bytes(config, dtype, experts)
        ),
        cache_bytes=_entries_read(config, tokens) * entry_bytes / config.num_hidden_layers,
        weight_flops=weight_flops,
        attention_flops=attention,
        int8_flops=attention - _bf16_flops(config, keys=keys) if is_int8 else 0.0,
    )


def attention_flops(config: ModelConfig, *, queries: int, keys: int, pairs: int | None) -> float:
    """FLOPs of attention scores and values over all layers. pairs: query-key pairs; None: all.

    kv_b_proj of the new tokens counts among the weights; the expanded path also expands the keys
    cached before. GLA and GTA count as the latent attention that computes them.
    """
    pairs = queries * keys if pairs is None else pairs
    layers = Counter(
        (config.attention_of(layer), _reach(config, layer))
        for layer in range(config.num_hidden_layers)
    )
    each = (
        number * _head_flops(attention, queries, keys, _pairs_within(window, queries, keys, pairs))
        for (attention, window), number in layers.items()
    )
    return float(config.num_attention_heads * sum(each))


def _pairs_within(window: int | None, queries: int, keys: int, pairs: int) -> int:
    """Query-key pairs inside a sliding window; the queries are the last of `keys` tokens."""
    if window is None:
        return pairs

    def up_to(tokens: int) -> int:
        inside = min(tokens, window)
        return inside * (inside + 1) // 2 + (tokens - inside) * window

    return min(pairs, up_to(keys) - up_to(keys - queries))


def _entries_read(config: ModelConfig, tokens: int) -> int:
    """KV cache entries read in all layers by a step after `tokens`, or by a prompt of `tokens`."""
    reaches = (_reach(config, layer) for layer in range(config.num_hidden_layers))
    return sum(tokens if reach is None else min(tokens, reach) for reach in reaches)


def _reach(config: ModelConfig, layer: int) -> int | None:
    """Most tokens that a query of the layer attends to: its sliding window, or the top-k of sparse
    attention (DSA); None for all. The indexer's own reads and FLOPs are left out.
    """
    attention, window = config.attention_of(layer), config.window(layer)
    indexer = attention.indexer if isinstance(attention, MLAConfig) else None
    bounds = [window, None if indexer is None else indexer.index_topk]
    return min((bound for bound in bounds if bound is not None), default=None)


def _bf16_flops(config: ModelConfig, *, keys: int) -> float:
    """FLOPs of one query's scores over the channels that an int8 cache stores in bf16."""
    layers = (config.attention_of(layer) for layer in range(config.num_hidden_layers))
    channels = sum(layer.entry_dim - layer.quantized_dim for layer in layers)
    return 2.0 * config.num_attention_heads * keys * channels


def _head_flops(attention: AttentionConfig, queries: int, keys: int, pairs: int) -> int:
    """FLOPs of one head in one layer."""
    if isinstance(attention, GQAConfig):
        return pairs * 4 * attention.head_dim
    if isinstance(attention, TPAConfig):
        products = 2 * (attention.k_rank + attention.v_rank) * attention.head_dim
        expanded = pairs * 4 * attention.head_dim + keys * products
        return min(pairs * products, expanded)
    index_key = attention.index_key_dim if isinstance(attention, MLAConfig) else 0
    latent = attention.entry_dim - index_key - attention.qk_rope_head_dim
    # Without NoPE channels the latent has values only.
    scored = latent if attention.qk_nope_head_dim else 0
    absorbed = pairs * 2 * (scored + attention.qk_rope_head_dim + latent)
    expanded = pairs * 2 * (attention.qk_head_dim + attention.v_head_dim)
    width = attention.qk_nope_head_dim + attention.v_head_dim
    expanded += (keys - queries) * 2 * latent * width
    return min(absorbed, expanded)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeBound:
    """Lower bound on the seconds of a case."""

    overlapped: float
    """Memory and arithmetic busy at the same time: the roofline."""
    serial: float
    """Weights, then attention, each at its own roofline."""


def step_seconds(cost: StepCost, dtype: str, rates: dict[str, float]) -> TimeBound:
    """The lower bound. rates: bandwidth in bytes/s; gemm_fp32, gemm_bf16, gemm_int8 in FLOP/s."""
    plain = rates["gemm_fp32" if dtype == "fp32" else "gemm_bf16"]
    # If the measured int8 GEMM is slower than bf16, bf16 is the bound.
    products, integers = max(plain, rates[RATES[dtype]]), max(plain, rates["gemm_int8"])
    weights = cost.weight_bytes / rates["bandwidth"], cost.weight_flops / products
    scores = (cost.attention_flops - cost.int8_flops) / plain + cost.int8_flops / integers
    attention = cost.cache_bytes / rates["bandwidth"], scores
    return TimeBound(
        overlapped=max(weights[0] + attention[0], weights[1] + attention[1]),
        serial=max(weights) + max(attention),
    )


def time_bound(
    config: ModelConfig,
    case: BenchmarkCase,
    *,
    dtype: str,
    weights: StoredWeights | None = None,
    entry_bytes: int,
    rates: dict[str, float],
    cache: str = "bf16",
) -> TimeBound:
    """Lower bound on the seconds per token of a case."""
    cost = step_cost(
        config, case, dtype=dtype, weights=weights, entry_bytes=entry_bytes, cache=cache
    )
    bound = step_seconds(cost, dtype, rates)
    tokens = case.tokens if case.kind == "prefill" else 1
    return TimeBound(overlapped=bound.overlapped / tokens, serial=bound.serial / tokens)


def _experts_used(config: ModelConfig, tokens: int) -> int:
    """Expected number of experts per layer that `tokens` tokens use, under uniform routing."""
    moe = config.moe
    if moe is None:
        return 0
    missed = (1 - moe.num_experts_per_tok / moe.n_routed_experts) ** tokens
    return round(moe.n_routed_experts * (1 - missed))
