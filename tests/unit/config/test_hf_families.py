"""Reading config.json of families related to DeepSeek-V3: what sets each apart."""

import math

import pytest

from lowlat.config.hf.reader import config_from_hf
from lowlat.config.model import MLAConfig

from .files import FAMILIES, MINICPM3, MISTRAL4, V3, YOUTU, refusal, without


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k2", "deepseek_v2", "glm4_moe_lite"])
def test_dense_and_sparse_layers_in_any_order(family: str):
    """transformers keeps a list of layer types where other files have two numbers."""
    raw = without(FAMILIES[family], "first_k_dense_replace")
    types = ["sparse", "dense", "dense", "sparse", "dense"]
    config = config_from_hf(raw | {"mlp_layer_types": types})
    assert [config.is_moe_layer(i) for i in range(5)] == [True, False, False, True, False]
    if family not in ("deepseek_v2",):
        mtp = {"mlp_layer_types": types, "num_nextn_predict_layers": 1}
        assert config_from_hf(raw | mtp).is_moe_layer(5)
    # the same layers, however the file says it
    frequent = FAMILIES[family] | {"first_k_dense_replace": 1, "moe_layer_freq": 2}
    listed = raw | {"mlp_layer_types": ["dense", "dense", "sparse", "dense", "sparse"]}
    by_list, by_number = config_from_hf(listed), config_from_hf(frequent)
    kinds = [by_list.is_moe_layer(i) == by_number.is_moe_layer(i) for i in range(5)]
    assert kinds == [True] * 5


def test_dense_families_with_latent_attention():
    youtu, minicpm3 = config_from_hf(YOUTU), config_from_hf(MINICPM3)
    assert youtu.moe is None and minicpm3.moe is None
    assert not config_from_hf(YOUTU | {"rope_interleave": False}).rope.rope_interleave
    assert "rope_interleave" in refusal(MINICPM3 | {"rope_interleave": True})
    assert "num_nextn_predict_layers" in refusal(YOUTU | {"num_nextn_predict_layers": 1})
    assert "n_routed_experts" in refusal(YOUTU | {"n_routed_experts": 8})


def test_minicpm3_scales():
    """Three factors; null is 1, and an absent one is nobody's default."""
    config = config_from_hf(MINICPM3)
    assert config.scale_emb == 12.0
    assert config.residual_scale == 1.4 / math.sqrt(5)
    assert config.output_scale == 6 / 42
    plain = config_from_hf(MINICPM3 | {"scale_depth": None, "dim_model_base": None})
    assert (plain.residual_scale, plain.output_scale) == (1.0, 1.0)
    for name in ("scale_emb", "scale_depth", "dim_model_base"):
        assert f"{name} is missing" in refusal(without(MINICPM3, name))
        assert f"{name} must be" in refusal(MINICPM3 | {name: 0})
        assert name in refusal(YOUTU | {name: 2})
    without_width = config_from_hf(without(MINICPM3, "v_head_dim")).attention
    assert isinstance(without_width, MLAConfig) and without_width.v_head_dim == 14


def test_mistral4():
    """Softmax scores without selection biases; queries scaled by their position."""
    config = config_from_hf(MISTRAL4)
    assert config.moe is not None
    assert (config.moe.scoring_func, config.moe.has_router_bias) == ("softmax", False)
    assert (config.rope.llama_4_scaling_beta, config.rope.factor) == (0.1, 4.0)
    share = {"rope_parameters": MISTRAL4["rope_parameters"] | {"partial_rotary_factor": 6 / 13}}
    assert config_from_hf(MISTRAL4 | share) == config
    share["rope_parameters"]["partial_rotary_factor"] = 0.5
    assert "partial_rotary_factor" in refusal(MISTRAL4 | share)
    scaling = {"rope_type": "default", "llama_4_scaling_beta": 0.1}
    assert "llama_4_scaling_beta" in refusal(V3 | {"rope_scaling": scaling})


def test_kimi_k25_is_its_language_part():
    text = V3 | {"model_type": "kimi_k2"}
    raw = {"model_type": "kimi_k25", "text_config": text, "vision_config": {"hidden_size": 9}}
    assert config_from_hf(raw | {"media_placeholder_token_id": 7}) == config_from_hf(text)
    assert "text_config.vocab_size" in refusal(raw | {"text_config": without(text, "vocab_size")})
    assert "text_config" in refusal(without(raw, "text_config"))
    assert "tie_word_embeddings" in refusal(raw | {"tie_word_embeddings": True})
    assert "quantization_config" in refusal(raw | {"quantization_config": {"bits": 4}})
