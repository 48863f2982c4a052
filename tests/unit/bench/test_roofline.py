"""The roofline against figures worked out by hand."""

from dataclasses import replace

import pytest
import torch

from lowlat.bench.benchmark_plan import BenchmarkCase
from lowlat.bench.roofline import case_cost, peak_rates, time_bound
from lowlat.config.model import IndexerConfig, MLAConfig, QuantConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.model.quant import store_packed, store_quantized
from lowlat.model.transformer import Transformer
from lowlat.plan.serving.step_cost import StepCost, TimeBound, attention_flops
from lowlat.plan.serving.step_cost import step_seconds as seconds_at
from tests import fakes
from tests.lowlat_configs import GLA, GTA, MLA, MOE, TPA, lowlat_config

from .benchmarks import random_checkpoint

MINI = random_checkpoint().config_of("mini")
ENTRY = 13_824
BIASES = 2 * 11 * 32
"""Bytes by which the selection biases of 11 routers, in fp32, exceed bf16."""
RATES = {"bandwidth": 1e10, "gemm_fp32": 1e11, "gemm_bf16": 1e12, "gemm_int8": 2e12}


def step_seconds(cost: StepCost, dtype: str, rates: dict[str, float]) -> TimeBound:
    return seconds_at(cost, peak_rates(dtype, rates))


def test_a_step_reads_active_weights_and_every_cache_entry() -> None:
    cost = case_cost(MINI, BenchmarkCase(kind="decode", tokens=8192), dtype="bf16")
    assert cost.weight_bytes == 2 * count_parameters(MINI).active_without_embedding + BIASES
    assert cost.weight_bytes == pytest.approx(409.2e6, rel=1e-3)
    assert cost.cache_bytes == 8193 * ENTRY
    assert cost.weight_flops == cost.weight_bytes - BIASES
    # absorbed: 12 layers, 16 heads, 8193 keys of 512 + 64 for the score and 512 for the value
    assert cost.attention_flops == 12 * 16 * 8193 * 2 * (576 + 512)


def test_sparse_attention_reads_all_index_keys_and_the_chosen_entries() -> None:
    assert isinstance(MINI.attention, MLAConfig)
    indexer = IndexerConfig(index_n_heads=8, index_head_dim=128, index_topk=2048)
    sparse = replace(MINI, attention=replace(MINI.attention, indexer=indexer))
    long = BenchmarkCase(kind="decode", tokens=8192)
    cost = case_cost(sparse, long, dtype="bf16")
    assert cost.cache_bytes == 2048 * ENTRY + 12 * 8193 * (128 + 4)
    index, chosen = 12 * 8193 * 2 * 8 * 128, 12 * 16 * 2048 * 2 * (576 + 512)
    assert cost.attention_flops == chosen + index
    short = case_cost(sparse, BenchmarkCase(kind="decode", tokens=2047), dtype="bf16")
    assert short.cache_bytes == 2048 * ENTRY
    assert short.attention_flops == chosen


@pytest.mark.parametrize("start", [0, 30])
def test_a_shared_choice_is_scored_once(start: int) -> None:
    """Of two layers the second shares the first's choice; queries of a prompt that see no more
    than the top-k score nothing."""
    assert isinstance(MINI.attention, MLAConfig)
    indexer = IndexerConfig(index_n_heads=8, index_head_dim=128, index_topk=50)
    own = replace(MINI.attention, indexer=indexer)
    shared = replace(MINI.attention, indexer=replace(indexer, is_shared=True))
    pairs = sum(range(start + 1, 101))

    def flops(*attention: MLAConfig) -> float:
        config = replace(MINI, attention=attention, num_hidden_layers=2)
        return attention_flops(config, queries=100 - start, keys=100, pairs=pairs)

    scores = sum(range(51, 101)) * 2 * 8 * 128
    assert flops(own, own) - flops(own, shared) == scores


def test_a_long_prompt_reads_every_expert_once_and_the_head_for_one_token() -> None:
    cost = case_cost(MINI, BenchmarkCase(kind="prefill", tokens=2048), dtype="bf16")
    count, head = count_parameters(MINI), 32000 * 1024
    assert cost.weight_bytes == 2 * (count.total - head) + BIASES
    per_token = count.active_without_embedding - head
    assert cost.weight_flops == 2 * (2048 * per_token + head)
    # expanded: 128 + 64 for the score, 128 for the value, half of all pairs
    assert cost.attention_flops == 12 * 16 * (2048 * 2049 // 2) * 2 * (192 + 128)


def test_a_short_prompt_does_not_reach_every_expert() -> None:
    one = case_cost(MINI, BenchmarkCase(kind="prefill", tokens=1), dtype="bf16")
    assert one.weight_bytes == 2 * count_parameters(MINI).active_without_embedding + BIASES


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_the_bytes_its_weights_have_in_memory(dtype: str, tied: bool) -> None:
    """Of a model whose tokens use every expert: all parameters but the input embedding."""
    moe = replace(MOE, num_experts_per_tok=MOE.n_routed_experts)
    config = replace(lowlat_config(MLA), tie_word_embeddings=tied, moe=moe)
    quant = QuantConfig(weight_block_size=(128, 128)) if dtype == "fp8" else None
    model = Transformer(replace(config, quantization=quant)).to(torch.bfloat16)
    if quant is not None:
        store_quantized(model, quant, num_hidden_layers=config.num_hidden_layers)
    elif dtype == "fp32":
        model = model.float()
    elif dtype != "bf16":
        model.add_head()
        store_packed(model, "int8" if dtype == "int8" else "int4")
    kept = model.state_dict()
    if not tied or dtype in ("int8", "int4"):
        del kept["embed_tokens.weight"]
    held = sum(p.numel() * (4 if "bias" in name else p.itemsize) for name, p in kept.items())
    cost = case_cost(config, BenchmarkCase(kind="decode", tokens=1), dtype=dtype)
    assert cost.weight_bytes == held


def test_int4_models_read_their_head_and_kv_b_proj_in_int8() -> None:
    cost = case_cost(MINI, BenchmarkCase(kind="decode", tokens=1), dtype="int4")
    assert cost.weight_bytes == pytest.approx(152.4e6, rel=1e-3)


def test_keys_beyond_the_window_are_not_read() -> None:
    config = replace(fakes.gqa_config(), sliding_window=16, sliding_window_layers=(1,))
    heads, dim = config.num_attention_heads, config.attention.head_dim
    assert config.num_hidden_layers == 2
    step = case_cost(config, BenchmarkCase(kind="decode", tokens=100), dtype="bf16")
    assert step.cache_bytes == (101 + 16) * 2 * config.attention.entry_dim
    assert step.attention_flops == heads * 4 * dim * (101 + 16)
    prompt = case_cost(config, BenchmarkCase(kind="prefill", tokens=100), dtype="bf16")
    seen = sum(range(1, 101)), sum(min(n, 16) for n in range(1, 101))
    assert prompt.attention_flops == heads * 4 * dim * sum(seen)
    assert attention_flops(config, queries=1, keys=8, pairs=None) == heads * 4 * dim * 16


def test_latents_without_nope_components_are_not_scored_by_their_latent() -> None:
    plain = lowlat_config(replace(MLA, qk_nope_head_dim=0))
    one = attention_flops(plain, queries=1, keys=97, pairs=None)
    attention = plain.attention
    assert one == 2 * 5 * 97 * 2 * (attention.kv_lora_rank + attention.qk_rope_head_dim)


def test_the_slower_of_memory_and_arithmetic_counts() -> None:
    cost = case_cost(MINI, BenchmarkCase(kind="decode", tokens=128), dtype="int8")
    memory = (cost.weight_bytes + cost.cache_bytes) / 1e10
    assert step_seconds(cost, "int8", RATES).overlapped == memory
    products = cost.weight_flops / 2e12 + cost.attention_flops / 1e12
    assert step_seconds(cost, "int8", RATES | {"bandwidth": 1e15}).overlapped == products


def test_sparse_attention_multiplies_the_rotary_channels_of_chosen_entries_in_bf16() -> None:
    """Regression: those of all cached entries, which left few integer products."""
    assert isinstance(MINI.attention, MLAConfig)
    indexer = IndexerConfig(index_n_heads=8, index_head_dim=128, index_topk=2048)
    sparse = replace(MINI, attention=replace(MINI.attention, indexer=indexer))
    case = BenchmarkCase(kind="decode", tokens=131_072)
    cost = case_cost(sparse, case, dtype="bf16", cache="int8")
    assert cost.attention_flops - cost.int8_flops == 12 * 16 * 2048 * 2 * 64


def test_serial_bound_adds_weights_and_attention() -> None:
    cost = case_cost(MINI, BenchmarkCase(kind="decode", tokens=32768), dtype="bf16")
    rates = RATES | {"gemm_bf16": 1e11}
    bound = step_seconds(cost, "bf16", rates)
    attention = cost.attention_flops / 1e11
    assert bound.overlapped == pytest.approx((cost.weight_flops + cost.attention_flops) / 1e11)
    assert bound.serial == pytest.approx(cost.weight_bytes / 1e10 + attention)
    fast = step_seconds(cost, "bf16", RATES | {"bandwidth": 1e15})
    assert fast.serial == pytest.approx(fast.overlapped)


def test_a_step_over_an_int8_cache_multiplies_its_latents_at_the_rate_of_int8() -> None:
    case = BenchmarkCase(kind="decode", tokens=8192)
    cost = case_cost(MINI, case, dtype="bf16", cache="int8")
    rotary = 12 * 16 * 8193 * 2 * 64
    assert cost.attention_flops - cost.int8_flops == rotary
    products = (cost.weight_flops + rotary) / 1e12 + cost.int8_flops / 2e12
    assert step_seconds(cost, "bf16", RATES | {"bandwidth": 1e15}).overlapped == pytest.approx(
        products
    )
    slow = RATES | {"bandwidth": 1e15, "gemm_int8": 1e9}
    assert step_seconds(cost, "bf16", slow).overlapped == pytest.approx(
        (cost.weight_flops + cost.attention_flops) / 1e12
    )


def test_int8_products_slower_than_bf16_do_not_lower_the_bar() -> None:
    cost = case_cost(MINI, BenchmarkCase(kind="prefill", tokens=2048), dtype="int8")
    slow = step_seconds(cost, "int8", RATES | {"gemm_int8": 1e9})
    assert slow.overlapped == pytest.approx((cost.weight_flops + cost.attention_flops) / 1e12)


def test_bf16_products_slower_than_fp32_do_not_lower_the_bar() -> None:
    cost = case_cost(MINI, BenchmarkCase(kind="prefill", tokens=2048), dtype="bf16")
    slow = step_seconds(cost, "bf16", RATES | {"gemm_bf16": 1e9})
    assert slow.overlapped == pytest.approx((cost.weight_flops + cost.attention_flops) / 1e11)


def test_the_bound_of_a_case_is_that_of_its_step() -> None:
    case = BenchmarkCase(kind="prefill", tokens=2048)
    cost = case_cost(MINI, case, dtype="bf16")
    bound = time_bound(MINI, case, dtype="bf16", rates=RATES)
    whole = step_seconds(cost, "bf16", RATES)
    assert bound == whole
    assert bound.serial == pytest.approx(bound.weights.seconds + bound.attention.seconds)


def test_expanding_a_long_cache_for_one_query_never_pays() -> None:
    one = attention_flops(MINI, queries=1, keys=10_000, pairs=None)
    assert one == 12 * 16 * 10_000 * 2 * 1088
    many = attention_flops(MINI, queries=10_000, keys=10_000, pairs=None)
    assert many == 12 * 16 * 10_000**2 * 2 * 320


def test_dense_gqa_models_with_tied_heads() -> None:
    config = replace(fakes.gqa_config(), tie_word_embeddings=True)
    cost = case_cost(config, BenchmarkCase(kind="prefill", tokens=5), dtype="fp32")
    assert cost.weight_bytes == 4 * count_parameters(config).total
    assert cost.attention_flops == 2 * 6 * 15 * 4 * 10


def test_each_layer_takes_its_cheaper_form() -> None:
    wide, narrow = replace(MLA, kv_lora_rank=97), replace(MLA, kv_lora_rank=2)
    shape = {"queries": 50, "keys": 50, "pairs": None}
    both, one, other = (
        attention_flops(lowlat_config(a), **shape) for a in ((wide, narrow), wide, narrow)
    )
    assert both == (one + other) / 2
    assert one == 2 * 5 * 2500 * 2 * (13 + 3) and other == 2 * 5 * 2500 * 2 * (2 * 2 + 6)


def test_further_forms_count_what_their_cheaper_arithmetic_costs() -> None:
    """GLA and GTA as the latent attention they are computed by; TPA factored for one query."""
    for attention, one in (
        (GLA, 2 * 26 + 6),
        (GTA, 2 * 30 + 4),
        (TPA, (2 + 1) * 14),
    ):
        config = lowlat_config(attention)
        heads = attention.num_attention_heads
        assert attention_flops(config, queries=1, keys=97, pairs=None) == 2 * heads * 97 * 2 * one
    config = lowlat_config(TPA)
    many = attention_flops(config, queries=97, keys=97, pairs=None)
    assert many == 2 * 5 * (97 * 97 * 4 * 14 + 97 * 2 * 3 * 14)
