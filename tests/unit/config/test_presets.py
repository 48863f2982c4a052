"""Presets: all there, all readable, with the settings that set the released models apart."""

import pytest

from lowlat.config.model import MLAConfig
from lowlat.config.presets import load_preset, preset_names
from lowlat.utils.errors import UserError


def test_names():
    assert set(preset_names()) == {
        "deepseek-v3",
        "deepseek-r1",
        "deepseek-v3.1",
        "deepseek-v3.2",
        "glm-5",
        "glm-5.2",
        "deepseek-v2",
        "deepseek-v2-lite",
        "moonlight-16b-a3b",
        "kimi-k2",
        "glm-4.7-flash",
        "gigachat3-10b-a1.8b",
        "youtu-llm-2b",
        "minicpm3-4b",
        "mistral-small-4-119b",
        "a.x-k1",
        "kimi-k2.5",
        "llama-3.1-8b",
        "llama-3.1-405b",
        "qwen2.5-72b",
        "smollm2-135m",
    }


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'gpt-2' is unknown.*deepseek-v3"):
        load_preset("gpt-2")
    with pytest.raises(UserError):
        load_preset("../presets/deepseek-v3")


def test_softmax_scale_has_the_yarn_factor():
    """m(mscale_all_dim)^2 is 1.874 for V3 and 1.590 for V2-Lite; leaving it out is silent."""
    v3, lite = load_preset("deepseek-v3"), load_preset("deepseek-v2-lite")
    assert v3.softmax_scale_of(0) * 192**0.5 == pytest.approx(1.874, abs=5e-4)
    assert lite.softmax_scale_of(0) * 192**0.5 == pytest.approx(1.590, abs=5e-4)
    assert load_preset("moonlight-16b-a3b").softmax_scale_of(0) == 192**-0.5


@pytest.mark.parametrize(
    ("name", "experts", "chosen", "shared", "groups", "kept", "scale", "dense"),
    [
        ("deepseek-v3", 256, 8, 1, 8, 4, 2.5, 3),
        ("deepseek-v2", 160, 6, 2, 8, 3, 16.0, 1),
        ("deepseek-v2-lite", 64, 6, 2, 1, 1, 1.0, 1),
        ("moonlight-16b-a3b", 64, 6, 2, 1, 1, 2.446, 1),
        ("kimi-k2", 384, 8, 1, 1, 1, 2.827, 1),
        ("glm-4.7-flash", 64, 4, 1, 1, 1, 1.8, 1),
        ("gigachat3-10b-a1.8b", 64, 4, 1, 1, 1, 1.0, 1),
        ("mistral-small-4-119b", 128, 4, 1, 1, 1, 1.0, 0),
        ("a.x-k1", 192, 8, 1, 8, 4, 2.5, 1),
        ("kimi-k2.5", 384, 8, 1, 1, 1, 2.827, 1),
        ("deepseek-v3.2", 256, 8, 1, 8, 4, 2.5, 3),
        ("glm-5", 256, 8, 1, 1, 1, 2.5, 3),
    ],
)
def test_experts(
    name: str,
    experts: int,
    chosen: int,
    shared: int,
    groups: int,
    kept: int,
    scale: float,
    dense: int,
):
    moe = load_preset(name).moe
    assert moe is not None
    assert (moe.n_routed_experts, moe.num_experts_per_tok) == (experts, chosen)
    assert (moe.n_shared_experts, moe.n_group, moe.topk_group) == (shared, groups, kept)
    assert (moe.routed_scaling_factor, moe.first_k_dense_replace) == (scale, dense)
    is_v2 = "v2" in name
    assert moe.scoring_func == ("softmax" if is_v2 or "mistral" in name else "sigmoid")
    assert moe.norm_topk_prob == (not is_v2)


def test_settings_that_differ():
    kimi = load_preset("kimi-k2")
    assert (kimi.rope.factor, kimi.rope.beta_fast, kimi.rope.beta_slow) == (32.0, 1.0, 1.0)
    moonlight = load_preset("moonlight-16b-a3b")
    assert (moonlight.rms_norm_eps, moonlight.rope.rope_type) == (1e-5, "default")
    glm = load_preset("glm-4.7-flash")
    assert isinstance(glm.attention, MLAConfig)
    assert (glm.attention.qk_nope_head_dim, glm.attention.v_head_dim) == (192, 256)
    assert (glm.num_nextn_predict_layers, glm.rope.rope_theta) == (1, 1e6)
    v31 = load_preset("deepseek-v3.1").quantization
    assert v31 is not None and v31.scale_fmt == "ue8m0"
    assert load_preset("smollm2-135m").tie_word_embeddings


def test_indexers():
    """V3.2 and GLM-5 have one in every layer; GLM-5.2 in 21 of 78: 0 to 2, then every fourth."""
    v32, glm, shared = (load_preset(name) for name in ("deepseek-v3.2", "glm-5", "glm-5.2"))
    assert isinstance(v32.attention, MLAConfig) and isinstance(glm.attention, MLAConfig)
    for config, heads, interleave in ((v32.attention, 64, False), (glm.attention, 32, True)):
        indexer = config.indexer
        assert indexer is not None
        assert (indexer.index_n_heads, indexer.index_head_dim) == (heads, 128)
        assert (indexer.index_topk, indexer.rope_interleave) == (2048, interleave)
    full = [
        layer
        for layer in range(78)
        if isinstance(own := shared.attention_of(layer), MLAConfig) and own.index_key_dim
    ]
    assert full == [0, 1, 2, *range(6, 78, 4)]
    assert (glm.num_nextn_predict_layers, glm.rms_norm_eps, glm.rope_of(0).rope_theta) == (
        1,
        1e-5,
        1e6,
    )
