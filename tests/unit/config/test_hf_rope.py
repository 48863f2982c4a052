"""Rotary settings: both spellings, every type, inferred factors, contradictions."""

import math
from typing import Any

import pytest

from lowlat.config.hf.reader import config_from_hf
from lowlat.config.model import RopeConfig

from .files import FAMILIES, LLAMA, MISTRAL, QWEN2, V2, V3, refusal, without

YARN = {"factor": 4.0, "original_max_position_embeddings": 53}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 61}


def rope(raw: dict[str, Any], **scaling: Any) -> RopeConfig:
    return config_from_hf(raw | {"rope_scaling": scaling}).rope


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_and_new_spelling_mean_the_same(key: str):
    old = V3 | {"rope_scaling": {key: "yarn", **YARN}}
    new = without(V3, "rope_theta")
    new |= {"rope_parameters": {"rope_type": "yarn", "rope_theta": 777.0, **YARN}}
    assert config_from_hf(old) == config_from_hf(new)
    assert config_from_hf(old).rope == RopeConfig(
        rope_theta=777.0,
        rope_type="yarn",
        rope_interleave=True,
        factor=4.0,
        original_max_position_embeddings=53,
    )


def test_no_scaling():
    plain = config_from_hf(LLAMA).rope
    assert plain == RopeConfig(rope_theta=777.0)
    for empty in (None, {}, {"type": "default"}, {"rope_type": None}):
        assert config_from_hf(LLAMA | {"rope_scaling": empty}).rope == plain


def test_theta_default_only_where_checkpoints_left_it_out():
    for family, raw in FAMILIES.items():
        if family in ("llama", "mistral", "deepseek_v2", "deepseek_v3", "minicpm3"):
            assert config_from_hf(without(raw, "rope_theta")).rope.rope_theta == 10000.0
        else:
            bare = without(without(raw, "rope_theta"), "rope_parameters")
            assert "rope_theta is missing" in refusal(bare)


def test_interleaved_layout():
    assert not config_from_hf(V3 | {"rope_interleave": False}).rope.rope_interleave
    assert config_from_hf(V2).rope.rope_interleave
    assert not config_from_hf(MISTRAL).rope.rope_interleave


def test_yarn_fields():
    full = rope(
        V3, type="yarn", beta_fast=16, beta_slow=2, mscale=0.707, mscale_all_dim=0.5, **YARN
    )
    assert (full.beta_fast, full.beta_slow, full.truncate) == (16.0, 2.0, True)
    assert (full.mscale, full.mscale_all_dim, full.attention_factor) == (0.707, 0.5, None)
    explicit = rope(QWEN2, rope_type="yarn", truncate=False, attention_factor=1.25, **YARN)
    assert (explicit.truncate, explicit.attention_factor) == (False, 1.25)
    same = rope(V3, type="yarn", beta_fast=1, beta_slow=1, **YARN)
    assert same.beta_fast == same.beta_slow == 1.0


def test_factor_and_original_context_are_inferred():
    """A missing factor is the ratio of the contexts; a missing original context is the whole."""
    inferred = rope(LLAMA, type="yarn", original_max_position_embeddings=53)
    assert inferred.factor == 211 / 53
    whole = rope(LLAMA, type="yarn", factor=2.0)
    assert whole.original_max_position_embeddings == 211
    outside = LLAMA | {"original_max_position_embeddings": 53, "rope_scaling": {"type": "yarn"}}
    assert config_from_hf(outside).rope == inferred


def test_llama3():
    settings = rope(LLAMA, rope_type="llama3", **LLAMA3)
    assert (settings.factor, settings.original_max_position_embeddings) == (8.0, 61)
    assert (settings.low_freq_factor, settings.high_freq_factor) == (1.0, 4.0)


def test_longrope():
    """attention_factor: explicit, else sqrt(1 + ln(s) / ln(original)), else 1 without extension."""
    factors = [1.0, 2.5, 7]
    both = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    settings = rope(V3, original_max_position_embeddings=53, **both)
    assert settings.pair_factors == (1.0, 2.5, 7.0)
    assert settings.factor == 211 / 53
    expected = math.sqrt(1 + math.log(211 / 53) / math.log(53))
    assert settings.attention_factor == pytest.approx(expected, rel=1e-15)
    assert rope(V3, **both).attention_factor == 1.0
    assert rope(V3, attention_factor=0.9, factor=9.0, **both).attention_factor == 0.9
    for change in (
        {"long_factor": [1.0, 2.5, 8.0, 9.0]},
        {"short_factor": [1.0, 2.5]},
        {"short_factor": [1.0, 0.0, 7]},
        {"short_factor": [1.0, True, 7]},
        {"short_factor": 3},
    ):
        assert "_factor" in refusal(V3 | {"rope_scaling": both | change})


def test_longrope_with_two_sets_of_factors():
    """The served context decides once; up to the original context the short factors serve."""
    short, long = [1.0, 2.5, 7.0], [1.5, 3.0, 8.0]
    both = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    settings = rope(V3, original_max_position_embeddings=53, **both)
    assert settings.pair_factors == tuple(short) and settings.long_pair_factors == tuple(long)
    for context, expected in ((2, short), (53, short), (54, long), (211, long)):
        served = settings.for_context(context)
        assert served.pair_factors == tuple(expected) and served.long_pair_factors is None
        assert served.attention_factor == settings.attention_factor
    assert rope(LLAMA).for_context(9) == rope(LLAMA)


def test_longrope_may_scale_the_softmax():
    factors = [1.0, 1.0, 1.0]
    both = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    config = config_from_hf(V3 | {"rope_scaling": {**both, "factor": 2.0, "mscale_all_dim": 3.0}})
    expected = 13**-0.5 * (0.3 * math.log(2.0) + 1) ** 2
    assert config.softmax_scale_of(0) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("scaling", "name"),
    [
        ({"type": "dynamic", "factor": 2.0}, "type"),
        ({"rope_type": "su"}, "rope_type"),
        ({"type": "yarn", "rope_type": "llama3", **YARN}, "type"),
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": 0.5}, "factor"),
        ({"type": "yarn", **YARN, "factor": True}, "factor"),
        ({"type": "yarn", **YARN, "factor": math.nan}, "factor"),
        ({"type": "yarn", **YARN, "mscale": "1.0"}, "mscale"),
        ({"type": "yarn", **YARN, "beta_fast": 0.5}, "beta_fast"),
        ({"type": "yarn", **YARN, "original_max_position_embeddings": 0}, "original_max_position"),
        ({"type": "yarn", **YARN, "short_factor": [1.0]}, "short_factor"),
        ({"type": "yarn", **YARN, "rope_theta": 1.0}, "rope_theta"),
        ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": None}, "low_freq_factor"),
        ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "default", "mrope_section": [1, 1]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ([1, 2], "rope_scaling"),
    ],
)
def test_refused_settings_are_named(scaling: object, name: str):
    raw = LLAMA if "rope_theta" not in str(scaling) else without(LLAMA, "rope_theta")
    assert name in refusal(raw | {"rope_scaling": scaling})


def test_contradictions():
    assert "rope_parameters" in refusal(
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {}}
    )
    assert "777" in refusal(LLAMA | {"rope_parameters": {"rope_theta": 5.0}})
    outside = {"original_max_position_embeddings": 7, "rope_scaling": {"type": "yarn", **YARN}}
    assert "original_max_position_embeddings" in refusal(LLAMA | outside)
