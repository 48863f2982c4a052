"""Frequencies, softmax scale and channel order of a converted model."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowlat.config.model import MLAConfig, RopeConfig
from lowlat.convert.parameters.shared_rope import channel_order, divisors, scale_exponent, wide_rope
from lowlat.ops.rope import inverse_frequencies
from tests import configs

LLAMA3 = replace(configs.LLAMA3, rope_theta=5e5, original_max_position_embeddings=8192)
YARN = RopeConfig(
    rope_theta=1e4, rope_type="yarn", factor=16.0, original_max_position_embeddings=4096
)


def test_channel_order_of_two_groups_by_hand() -> None:
    assert channel_order(2, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_channel_order_of_one_group_changes_nothing() -> None:
    assert channel_order(1, 22).tolist() == [list(range(22))]


@settings(max_examples=50, deadline=None)
@given(theta=st.floats(1e3, 1e7), pairs=st.integers(1, 96))
def test_default_frequencies_come_back_to_the_bit(theta: float, pairs: int) -> None:
    """Regression: one unit in the last place of a fast pair, 0.006 radians at 100,000."""
    wanted = inverse_frequencies(RopeConfig(rope_theta=theta), 2 * pairs)
    wide = wide_rope(wanted, 1.0, 3, 4096)
    assert torch.equal(inverse_frequencies(wide, 6 * pairs), wanted.repeat(3))


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_scaled_frequencies_come_back_to_the_last_place(rope: RopeConfig) -> None:
    wanted = inverse_frequencies(rope, 128)
    got = 1.0 / divisors(wanted)
    off = got != wanted
    assert off.sum() <= 4
    assert ((got - wanted).abs() <= wanted * 2.0**-23).all()


def test_divisor_is_the_best_of_its_neighbours() -> None:
    wanted = torch.linspace(0.3, 1.0, 1009)
    found = divisors(wanted)
    error = (1.0 / found - wanted).abs()
    for direction in (0.0, math.inf):
        neighbour = torch.nextafter(found, torch.full_like(found, direction))
        assert (error <= (1.0 / neighbour - wanted).abs()).all()


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7, 8, 11, 32])
@pytest.mark.parametrize("head_dim", [6, 22, 64, 80, 128])
def test_softmax_scale_is_that_of_the_narrow_head(groups: int, head_dim: int) -> None:
    """Regression: scaling q by sqrt(groups) instead, which bf16 and 4-bit weights cannot hold."""
    rope = wide_rope(torch.ones(head_dim // 2), 1.0, groups, 64)
    attention = MLAConfig(
        num_attention_heads=groups,
        kv_lora_rank=groups * head_dim,
        q_lora_rank=None,
        qk_nope_head_dim=0,
        qk_rope_head_dim=groups * head_dim,
        v_head_dim=head_dim,
    )
    config = configs.model_config("deepseek_v3", attention, rope=rope)
    assert config.softmax_scale_of(0) == pytest.approx(head_dim**-0.5, rel=3e-16)


def test_one_group_needs_no_scale() -> None:
    assert scale_exponent(1, 64) == 0.0
