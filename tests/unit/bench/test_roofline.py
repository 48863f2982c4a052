"""The roofline against figures worked out by hand."""

from dataclasses import replace

import fakes
import pytest
from lowlat_configs import GLA, GTA, MLA, TPA, lowlat_config

from lowlat.bench.plan import Cell
from lowlat.bench.roofline import attention_flops, seconds, tokens_per_second, work_of
from lowlat.config.arithmetic import count_parameters

from .benchmarks import random_checkpoint

MINI = random_checkpoint().config_of("mini")
ROW = 13_824
RATES = {"bandwidth": 1e10, "gemm_fp32": 1e11, "gemm_bf16": 1e12, "gemm_int8": 2e12}


def test_a_step_reads_active_weights_and_every_row() -> None:
    work = work_of(MINI, Cell(kind="decode", tokens=8192), dtype="bf16", row_bytes=ROW)
    assert work.weight_bytes == 2 * count_parameters(MINI).active_without_embedding
    assert work.weight_bytes == pytest.approx(409.2e6, rel=1e-3)
    assert work.cache_bytes == 8192 * 13_824
    assert work.weight_flops == work.weight_bytes
    # absorbed: 12 layers, 16 heads, 8193 keys of 512 + 64 for the score and 512 for the value
    assert work.attention_flops == 12 * 16 * 8193 * 2 * (576 + 512)


def test_a_long_prompt_reads_every_expert_once_and_the_head_for_one_token() -> None:
    work = work_of(MINI, Cell(kind="prefill", tokens=2048), dtype="bf16", row_bytes=ROW)
    count, head = count_parameters(MINI), 32000 * 1024
    assert work.weight_bytes == pytest.approx(2 * (count.total - head), rel=1e-6)
    per_token = count.active_without_embedding - head
    assert work.weight_flops == 2 * (2048 * per_token + head)
    # expanded: 128 + 64 for the score, 128 for the value, half of all pairs
    assert work.attention_flops == 12 * 16 * (2048 * 2049 // 2) * 2 * (192 + 128)


def test_a_short_prompt_does_not_reach_every_expert() -> None:
    one = work_of(MINI, Cell(kind="prefill", tokens=1), dtype="bf16", row_bytes=ROW)
    assert one.weight_bytes == pytest.approx(2 * count_parameters(MINI).active_without_embedding)


@pytest.mark.parametrize(
    ("dtype", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8.5), ("int4", 5), ("fp8", 8.002)]
)
def test_bytes_of_a_weight(dtype: str, bits: float) -> None:
    work = work_of(MINI, Cell(kind="decode", tokens=1), dtype=dtype, row_bytes=ROW)
    active = count_parameters(MINI).active_without_embedding
    assert work.weight_bytes * 8 / active == pytest.approx(bits, rel=1e-4)


def test_the_slower_of_memory_and_arithmetic_counts() -> None:
    work = work_of(MINI, Cell(kind="decode", tokens=128), dtype="int8", row_bytes=ROW)
    memory = (work.weight_bytes + work.cache_bytes) / 1e10
    assert seconds(work, "int8", RATES) == memory
    products = work.weight_flops / 2e12 + work.attention_flops / 1e12
    assert seconds(work, "int8", RATES | {"bandwidth": 1e15}) == products


def test_a_step_over_an_int8_cache_multiplies_its_latents_at_the_rate_of_int8() -> None:
    cell = Cell(kind="decode", tokens=8192)
    work = work_of(MINI, cell, dtype="bf16", row_bytes=ROW, cache="int8")
    rotary = 12 * 16 * 8193 * 2 * 64
    assert work.attention_flops - work.int8_flops == rotary
    products = (work.weight_flops + rotary) / 1e12 + work.int8_flops / 2e12
    assert seconds(work, "bf16", RATES | {"bandwidth": 1e15}) == pytest.approx(products)
    slow = RATES | {"bandwidth": 1e15, "gemm_int8": 1e9}
    assert seconds(work, "bf16", slow) == pytest.approx(
        (work.weight_flops + work.attention_flops) / 1e12
    )


def test_int8_products_slower_than_bf16_do_not_lower_the_bar() -> None:
    work = work_of(MINI, Cell(kind="prefill", tokens=2048), dtype="int8", row_bytes=ROW)
    slow = seconds(work, "int8", RATES | {"gemm_int8": 1e9})
    assert slow == pytest.approx((work.weight_flops + work.attention_flops) / 1e12)


def test_rates_are_tokens_per_second() -> None:
    cell = Cell(kind="prefill", tokens=2048)
    work = work_of(MINI, cell, dtype="bf16", row_bytes=ROW)
    rate = tokens_per_second(MINI, cell, dtype="bf16", row_bytes=ROW, rates=RATES)
    assert rate == pytest.approx(2048 / seconds(work, "bf16", RATES))


def test_expanding_a_long_cache_for_one_query_never_pays() -> None:
    one = attention_flops(MINI, queries=1, keys=10_000, pairs=None)
    assert one == 12 * 16 * 10_000 * 2 * 1088
    many = attention_flops(MINI, queries=10_000, keys=10_000, pairs=None)
    assert many == 12 * 16 * 10_000**2 * 2 * 320


def test_dense_gqa_models_with_tied_heads() -> None:
    config = replace(fakes.gqa_config(), tie_word_embeddings=True)
    work = work_of(config, Cell(kind="prefill", tokens=5), dtype="fp32", row_bytes=1)
    assert work.weight_bytes == 4 * count_parameters(config).total
    assert work.attention_flops == 2 * 6 * 15 * 4 * 10


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
