"""The fastest a step can be: bytes it must move and multiply-adds it must do, on this machine.

    seconds >= max((weights read + cache rows) / bandwidth,
                   FLOPs of the weights / GEMM rate + FLOPs of attention / GEMM rate)

which is reached where weights are read while attention is computed. In turn, the least is that of
the weights and that of attention, added: where one is bound by memory and the other by arithmetic,
that is more.

A step over an int8 cache can multiply its int8 channels at the rate of int8.

A step of decoding reads the weights one token uses and every cached row it attends to once. A
prompt reads what its tokens hit together (with enough tokens, every expert) once. Attention is
counted in the cheaper of its two forms: absorbed or expanded. Two FLOPs are one multiply-add. Zeros
count like other weights, also where a conversion left whole tiles of them, which kernels skip.
"""

from collections import Counter
from dataclasses import dataclass

from lowlat.bench.plan import Cell
from lowlat.config.model import AttentionConfig, GQAConfig, ModelConfig, TPAConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.config.weight_memory import read_bytes

RATES = {
    "fp32": "gemm_fp32",
    "bf16": "gemm_bf16",
    "fp8": "gemm_bf16",
    "int8": "gemm_int8",
    "int4": "gemm_int8",
}
"""The measured rate that bounds products with weights of a dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a step or a prompt cannot do without."""

    weight_bytes: float
    cache_bytes: float
    weight_flops: float
    attention_flops: float
    int8_flops: float = 0.0
    """Of attention, those over channels that are cached in int8."""


def work_of(
    config: ModelConfig, cell: Cell, *, dtype: str, row_bytes: int, cache: str = "bf16"
) -> Work:
    """The work of one cell: the whole prompt, or one step.

    row_bytes: cache of one token in all layers. cache: what rows are cached in.
    """
    count, tokens = count_parameters(config), cell.tokens
    if cell.kind == "prefill":
        head = config.vocab_size * config.hidden_size
        experts = _hit(config, tokens)
        # only the last token needs the head
        weight_flops = 2.0 * ((count.active_without_embedding - head) * tokens + head)
        queries, keys, pairs = tokens, tokens, tokens * (tokens + 1) // 2
    else:
        experts = config.moe.num_experts_per_tok if config.moe else 0
        weight_flops = 2.0 * count.active_without_embedding
        queries, keys, pairs = 1, tokens + 1, tokens + 1
    attention = attention_flops(config, queries=queries, keys=keys, pairs=pairs)
    is_int8 = cell.kind == "decode" and cache == "int8"
    return Work(
        weight_bytes=float(read_bytes(config, dtype, experts)),
        cache_bytes=_rows_read(config, tokens) * row_bytes / config.num_hidden_layers,
        weight_flops=weight_flops,
        attention_flops=attention,
        int8_flops=attention - _bf16_flops(config, keys=keys) if is_int8 else 0.0,
    )


def attention_flops(config: ModelConfig, *, queries: int, keys: int, pairs: int | None) -> float:
    """FLOPs of scores and values over all layers. pairs: query-key pairs, None for all of them.

    Products with kv_b_proj of the queries' own tokens are among the weights; the expanded form
    also has to expand the keys cached before. GLA and GTA are counted as the latent attention they
    are computed by.
    """
    pairs = queries * keys if pairs is None else pairs
    layers = Counter(
        (config.attention_of(layer), config.window(layer))
        for layer in range(config.num_hidden_layers)
    )
    each = (
        number * _head_flops(attention, queries, keys, _pairs_within(window, queries, keys, pairs))
        for (attention, window), number in layers.items()
    )
    return float(config.num_attention_heads * sum(each))


def _pairs_within(window: int | None, queries: int, keys: int, pairs: int) -> int:
    """Those of `pairs` within `window` keys; of `keys` tokens the last `queries` ask."""
    if window is None:
        return pairs

    def up_to(tokens: int) -> int:
        inside = min(tokens, window)
        return inside * (inside + 1) // 2 + (tokens - inside) * window

    return min(pairs, up_to(keys) - up_to(keys - queries))


def _rows_read(config: ModelConfig, tokens: int) -> int:
    """Cached rows of all layers that a step after `tokens`, or a prompt of `tokens`, reads."""
    windows = (config.window(layer) for layer in range(config.num_hidden_layers))
    return sum(tokens if window is None else min(tokens, window) for window in windows)


def _bf16_flops(config: ModelConfig, *, keys: int) -> float:
    """FLOPs of one query's scores over channels that an int8 cache keeps in bf16."""
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
    latent = attention.entry_dim - attention.qk_rope_head_dim
    # Without a part that is not rotated the latent holds values alone.
    scored = latent if attention.qk_nope_head_dim else 0
    absorbed = pairs * 2 * (scored + attention.qk_rope_head_dim + latent)
    expanded = pairs * 2 * (attention.qk_head_dim + attention.v_head_dim)
    width = attention.qk_nope_head_dim + attention.v_head_dim
    expanded += (keys - queries) * 2 * latent * width
    return min(absorbed, expanded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Least:
    """The least seconds of a cell."""

    together: float
    """Memory and arithmetic both busy all the time: the roofline."""
    in_turn: float
    """Weights first, then attention, each with both busy."""


def seconds(work: Work, dtype: str, rates: dict[str, float]) -> Least:
    """The least time. rates: bandwidth in bytes/s; gemm_fp32, gemm_bf16, gemm_int8 in FLOP/s."""
    plain = rates["gemm_fp32" if dtype == "fp32" else "gemm_bf16"]
    # Where the int8 product that was measured is slower than bf16, bf16 is the better way.
    products, integers = max(plain, rates[RATES[dtype]]), max(plain, rates["gemm_int8"])
    weights = work.weight_bytes / rates["bandwidth"], work.weight_flops / products
    scores = (work.attention_flops - work.int8_flops) / plain + work.int8_flops / integers
    attention = work.cache_bytes / rates["bandwidth"], scores
    return Least(
        together=max(weights[0] + attention[0], weights[1] + attention[1]),
        in_turn=max(weights) + max(attention),
    )


def least_seconds(
    config: ModelConfig,
    cell: Cell,
    *,
    dtype: str,
    row_bytes: int,
    rates: dict[str, float],
    cache: str = "bf16",
) -> Least:
    """The least seconds per token of a cell."""
    work = work_of(config, cell, dtype=dtype, row_bytes=row_bytes, cache=cache)
    least = seconds(work, dtype, rates)
    tokens = cell.tokens if cell.kind == "prefill" else 1
    return Least(together=least.together / tokens, in_turn=least.in_turn / tokens)


def _hit(config: ModelConfig, tokens: int) -> int:
    """Routed experts of a layer that `tokens` tokens are expected to use, chosen at random."""
    moe = config.moe
    if moe is None:
        return 0
    missed = (1 - moe.num_experts_per_tok / moe.n_routed_experts) ** tokens
    return round(moe.n_routed_experts * (1 - missed))
