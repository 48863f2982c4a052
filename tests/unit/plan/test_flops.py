"""FLOPs per token against sums written out by hand and against published figures."""

from dataclasses import replace

import pytest

from lowlat.config.model import MLAConfig
from lowlat.config.presets import load_preset
from lowlat.plan.flops import average_keys, token_flops, up_projections
from tests.configs import PLAIN_MOE
from tests.fakes import gqa_config, mla_config


def test_deepseek_v3_at_4k_by_hand():
    """Every term of the report's dimensions, multiply-adds per token in thousands of millions."""
    heads, keys = 128, (4096 + 1) / 2
    attention = (
        7168 * 1536  # to the query latent
        + 1536 * heads * (128 + 64)  # queries
        + 7168 * (512 + 64)  # to the latent and the shared key
        + 512 * heads * (128 + 128)  # keys and values
        + heads * 128 * 7168  # output
    )
    scores = heads * ((128 + 64) + 128) * keys
    dense = 3 * 7168 * 18432
    expert = 3 * 7168 * 2048
    moe = (8 + 1) * expert + 256 * 7168
    main = 61 * (attention + scores) + 3 * dense + 58 * moe + 129280 * 7168
    found = token_flops(load_preset("deepseek-v3"), 4096)
    without_mtp = found.training - 3 * found.parts["MTP"]
    assert without_mtp == pytest.approx(3 * 2 * main)
    # 250 GFLOPs per token (arXiv 2505.09343, table 2).
    assert without_mtp == pytest.approx(250e9, rel=0.005)
    mtp = attention + scores + moe + 2 * 7168 * 7168 + 129280 * 7168
    assert found.parts["MTP"] == pytest.approx(2 * mtp)


def test_deepseek_v2_as_published():
    """155 GFLOPs per token (arXiv 2505.09343, table 2)."""
    found = token_flops(load_preset("deepseek-v2"), 4096)
    assert found.training == pytest.approx(155e9, rel=0.005)


def test_grouped_attention_by_hand():
    found = token_flops(gqa_config(), 7)
    projections = 23 * (60 + 30 + 30 + 60)
    assert found.parts["attention"] == 2 * 2 * projections
    assert found.parts["scores"] == 2 * 2 * 6 * (10 + 10) * 4
    assert found.parts["dense MLP"] == 2 * 2 * 3 * 23 * 31
    assert found.parts["head"] == 2 * 263 * 23
    assert found.parts["routed"] == found.parts["MTP"] == 0


def test_a_window_limits_the_keys():
    assert average_keys(5, None) == 3
    assert average_keys(5, 2) == (1 + 2 + 2 + 2 + 2) / 5
    assert average_keys(5, 9) == 3


def test_experts_that_are_not_chosen_cost_nothing():
    moe = replace(PLAIN_MOE, n_routed_experts=7)
    few = token_flops(mla_config(moe=moe), 5)
    many = token_flops(mla_config(moe=replace(moe, n_routed_experts=14)), 5)
    assert many.parts["routed"] == few.parts["routed"] == 2 * 2 * 3 * 23 * 11
    assert many.parts["router"] == 2 * few.parts["router"]


def test_layers_that_differ_are_counted_one_by_one():
    """Half of what two layers of the one and two of the other cost."""
    base = mla_config(model_type="lowlat", num_nextn_predict_layers=0)
    assert isinstance(base.attention, MLAConfig)
    wide = replace(base.attention, kv_lora_rank=97, qk_nope_head_dim=3, v_head_dim=13)
    found, first, second = (
        token_flops(replace(base, attention=attention), 9).parts
        for attention in ((base.attention, wide), base.attention, wide)
    )
    for part in ("attention", "scores"):
        assert found[part] == (first[part] + second[part]) / 2 and first[part] != second[part]


def test_recomputation_is_executed_but_not_trained_on():
    config = mla_config()
    plain, selective, layers = (
        token_flops(config, 5, how) for how in ("none", "selective", "full")
    )
    assert plain.training == selective.training == layers.training == plain.executed
    # Two decoder layers and two MTP modules.
    assert selective.recomputed == 4 * 2 * up_projections(config.attention)
    main = sum(layers.parts[part] for part in ("attention", "scores", "dense MLP"))
    assert layers.recomputed == pytest.approx(2 * main)
