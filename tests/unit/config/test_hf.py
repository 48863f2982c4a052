"""Reading config.json: every family, defaults, and every kind of refusal."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowlat.config.hf.families import MLA_FAMILIES
from lowlat.config.hf.reader import config_from_hf
from lowlat.config.model import GQAConfig, MLAConfig, MoEConfig, QuantConfig
from lowlat.utils.errors import UserError

from .files import (
    FAMILIES,
    GLM,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    V2,
    V3,
    refusal,
    without,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_every_family(family: str):
    config = config_from_hf(FAMILIES[family])
    assert config.model_type == family
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (42, 29, 5)
    assert (config.vocab_size, config.max_position_embeddings) == (101, 211)
    assert (config.rms_norm_eps, config.rope.rope_theta) == (1e-5, 777.0)
    is_mla = family in MLA_FAMILIES
    assert isinstance(config.attention_of(0), MLAConfig if is_mla else GQAConfig)
    assert config.rope.rope_interleave == (is_mla and family != "minicpm3")
    assert config.quantization is None and not config.tie_word_embeddings


def test_mla_attention_and_experts():
    config = config_from_hf(V3 | {"num_nextn_predict_layers": 1})
    assert config.attention == MLAConfig(
        num_attention_heads=3,
        kv_lora_rank=13,
        q_lora_rank=17,
        qk_nope_head_dim=7,
        qk_rope_head_dim=6,
        v_head_dim=11,
    )
    assert config.moe == MoEConfig(
        n_routed_experts=12,
        num_experts_per_tok=4,
        n_shared_experts=1,
        moe_intermediate_size=19,
        first_k_dense_replace=2,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    assert config.num_nextn_predict_layers == 1
    assert [config.is_moe_layer(i) for i in range(6)] == [False, False, True, True, True, True]


def test_v2_with_normalised_weights_is_refused():
    """transformers ignores norm_topk_prob of V2; dividing differed from it by 22 %."""
    with pytest.raises(UserError, match=r"norm_topk_prob true is not supported; .*to false"):
        config_from_hf(V2 | {"norm_topk_prob": True})
    v2 = config_from_hf(V2).moe
    assert v2 is not None and not v2.norm_topk_prob
    assert (v2.scoring_func, v2.topk_method) == ("softmax", "group_limited_greedy")


def test_v2_with_one_expert_per_token_is_never_normalised():
    """Every implementation but inference/model.py scales the one weight and does not divide it."""
    moe = config_from_hf(V2 | {"norm_topk_prob": True, "num_experts_per_tok": 1}).moe
    assert moe is not None and moe.norm_topk_prob and not moe.scale_after_norm


def test_greedy_selection_ignores_groups():
    """V2-Lite's file may give any groups: greedy selection never looks at them."""
    raw = without(without(V2, "n_group"), "topk_group") | {"topk_method": "greedy"}
    for extra in ({}, {"n_group": 1, "topk_group": 1}, {"n_group": 5, "topk_group": 3}):
        moe = config_from_hf(raw | extra).moe
        assert moe is not None and (moe.n_group, moe.topk_group) == (1, 1)


def test_query_latent_has_no_default():
    """A default of 1536 would silently build low-rank queries where the field was left out."""
    config = config_from_hf(V3 | {"q_lora_rank": None})
    assert isinstance(config.attention, MLAConfig) and config.attention.q_lora_rank is None
    assert "q_lora_rank is missing" in refusal(without(V3, "q_lora_rank"))


@pytest.mark.parametrize("head_dim", [6, 13, 64, 0, None])
def test_head_dim_of_latent_attention_is_ignored(head_dim: int | None):
    """Files give the rotary width, the full width or anything else as head_dim of MLA."""
    assert config_from_hf(V3 | {"head_dim": head_dim}) == config_from_hf(V3)


def test_glm_layer_types():
    assert config_from_hf(GLM).moe == config_from_hf(GLM | {"first_k_dense_replace": 1}).moe
    types = ["dense", "dense", "dense", "sparse", "sparse"]
    moe = config_from_hf(GLM | {"mlp_layer_types": types}).moe
    assert moe is not None and (moe.first_k_dense_replace, moe.n_group) == (3, 1)
    for bad in (types[:4], ["x"] * 5):
        assert "mlp_layer_types" in refusal(GLM | {"mlp_layer_types": bad})
    for other in ({"first_k_dense_replace": 1}, {"moe_layer_freq": 2}):
        message = refusal(GLM | {"mlp_layer_types": types} | other)
        assert "mlp_layer_types contradicts" in message and next(iter(other)) in message


def test_dense_model_of_an_expert_family():
    assert config_from_hf(V3 | {"first_k_dense_replace": 5}).moe is None
    assert config_from_hf(V3 | {"n_routed_experts": None}).moe is None
    with_mtp = config_from_hf(V3 | {"first_k_dense_replace": 5, "num_nextn_predict_layers": 1})
    assert with_mtp.moe is not None and with_mtp.is_moe_layer(5)
    assert "n_routed_experts is missing" in refusal(without(V3, "n_routed_experts"))


def test_two_spellings_of_one_field():
    raw = without(V3, "n_routed_experts") | {"num_local_experts": 12, "num_mtp_layers": 1}
    assert config_from_hf(raw) == config_from_hf(V3 | {"num_nextn_predict_layers": 1})
    message = refusal(raw | {"num_nextn_predict_layers": 2})
    assert "num_mtp_layers" in message and "num_nextn_predict_layers" in message


def test_biases_by_family():
    """qwen2 has q, k, v biases without saying so; attention_bias elsewhere means o as well."""

    def biases(raw: dict[str, Any]) -> tuple[bool, bool, bool]:
        attention = config_from_hf(raw).attention
        assert isinstance(attention, GQAConfig)
        return attention.qkv_bias, attention.o_bias, attention.qk_norm

    assert biases(QWEN2) == (True, False, False)
    assert biases(LLAMA) == biases(MISTRAL) == (False, False, False)
    assert biases(LLAMA | {"attention_bias": True}) == (True, True, False)
    assert biases(QWEN3) == (False, False, True)
    assert biases(QWEN3 | {"attention_bias": True}) == (True, True, True)


def test_head_dim_of_grouped_attention():
    def head_dim(raw: dict[str, Any]) -> int:
        attention = config_from_hf(raw).attention
        assert isinstance(attention, GQAConfig)
        return attention.head_dim

    assert head_dim(LLAMA) == head_dim(LLAMA | {"head_dim": None}) == 14
    assert head_dim(LLAMA | {"head_dim": 8}) == 8
    assert head_dim(without(QWEN3, "head_dim")) == 128
    assert "hidden_size" in refusal(LLAMA | {"hidden_size": 44})
    assert "head_dim 7 must be even" in refusal(LLAMA | {"head_dim": 7})


def test_sliding_windows():
    def windows(raw: dict[str, Any]) -> list[int | None]:
        config = config_from_hf(raw)
        return [config.window(layer) for layer in range(config.num_hidden_layers)]

    assert windows(MISTRAL) == [31] * 5
    assert windows(MISTRAL | {"sliding_window": None}) == [None] * 5
    assert "sliding_window is missing" in refusal(without(MISTRAL, "sliding_window"))
    off = QWEN2 | {"sliding_window": 23, "max_window_layers": 3}
    assert windows(off) == [None] * 5
    on = off | {"use_sliding_window": True}
    assert windows(on) == [None, None, None, 23, 23]
    assert windows(on | {"max_window_layers": 0}) == [23] * 5
    assert config_from_hf(on | {"max_window_layers": 0}).sliding_window_layers is None
    assert windows(on | {"max_window_layers": 5}) == [None] * 5
    types = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    assert windows(on | {"layer_types": types}) == [None, 23, None, 23, None]
    assert "layer_types" in refusal(on | {"layer_types": types[:3]})
    assert "layer_types" in refusal(on | {"layer_types": ["linear_attention"] * 5})
    assert "layer_types" in refusal(off | {"layer_types": types})
    assert "max_window_layers is missing" in refusal(without(on, "max_window_layers"))


def test_token_ids():
    assert config_from_hf(LLAMA).eos_token_ids == ()
    assert config_from_hf(LLAMA | {"eos_token_id": 0}).eos_token_ids == (0,)
    config = config_from_hf(LLAMA | {"eos_token_id": [7, 5], "bos_token_id": 3})
    assert (config.eos_token_ids, config.bos_token_id) == ((7, 5), 3)
    for bad in (-1, True, "2", [1, "2"], [True], [-1], {}):
        assert "eos_token_id" in refusal(LLAMA | {"eos_token_id": bad})


def test_fp8_quantisation():
    quant = {"quant_method": "fp8", "weight_block_size": [128, 64], "fmt": "e4m3"}
    quant |= {"activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
    config = config_from_hf(V3 | {"quantization_config": quant | {"modules_to_not_convert": ["a"]}})
    assert config.quantization == QuantConfig(
        weight_block_size=(128, 64), scale_fmt="ue8m0", modules_to_not_convert=("a",)
    )
    for change in (
        {"quant_method": "aqlm"},
        {"fmt": "e5m2"},
        {"activation_scheme": "static"},
        {"scale_fmt": "mxfp8"},
        {"expert_dtype": "fp4"},
        {"dequantize": True},
        {"modules_to_convert": ["model.embed_tokens"]},
        {"weight_block_size": [128]},
        {"weight_block_size": [128, 0]},
        {"weight_block_size": [True, 128]},
        {"modules_to_not_convert": [1]},
        {"weight_bits": 4},
    ):
        name = next(iter(change))
        message = refusal(V3 | {"quantization_config": quant | change})
        assert f"quantization_config.{name}" in message


def test_fp8_settings_as_transformers_writes_them():
    """Every field it has, at its default."""
    quant = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    quant |= {"dequantize": False, "modules_to_not_convert": None, "modules_to_convert": None}
    quant |= {"scale_fmt": "float", "expert_dtype": "fp8"}
    config = config_from_hf(V3 | {"quantization_config": quant})
    assert config.quantization == QuantConfig(weight_block_size=(128, 128))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_needed_field_is_missed_by_name(family: str):
    needed = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    needed |= {"vocab_size", "max_position_embeddings", "rms_norm_eps"}
    mla = {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
    mla |= {"num_experts_per_tok", "moe_intermediate_size", "n_shared_experts"}
    needed |= {name for name in mla if name in FAMILIES[family]}
    if family == "minicpm3":
        needed.remove("v_head_dim")  # by default hidden_size / num_attention_heads
    for name in sorted(needed):
        assert f"{name} is missing" in refusal(without(FAMILIES[family], name))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", True),
        ("hidden_size", "4096"),
        ("hidden_size", 4096.0),
        ("hidden_size", 0),
        ("hidden_size", -1),
        ("hidden_size", 2**31),
        ("hidden_size", [42]),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 10**400),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", math.inf),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-6"),
        ("rope_theta", 10**400),
        ("routed_scaling_factor", -1.0),
        ("qk_rope_head_dim", 7),
        ("tie_word_embeddings", 1),
        ("attention_bias", "false"),
        ("num_experts_per_tok", 13),
        ("num_experts_per_tok", 9),
        ("n_group", 5),
        ("n_group", 12),
        ("topk_group", 4),
        ("num_key_value_heads", 1),
        ("num_nextn_predict_layers", -1),
        ("n_shared_experts", -1),
    ],
)
def test_wrong_types_and_sizes(name: str, value: object):
    """9 experts per token of 12 is too many too: only 8 are in the 2 groups a token may use."""
    assert name in refusal(V3 | {name: value})


def test_heads_must_be_a_multiple_of_groups():
    assert "num_key_value_heads 2" in refusal(LLAMA | {"num_key_value_heads": 2})


@pytest.mark.parametrize(
    ("raw", "name", "value"),
    [
        (LLAMA, "hidden_act", "gelu"),
        (LLAMA, "mlp_bias", True),
        (LLAMA, "attention_dropout", 0.1),
        (LLAMA, "partial_rotary_factor", 0.5),
        (LLAMA, "rope_interleave", True),
        (LLAMA, "num_nextn_predict_layers", 1),
        (LLAMA, "model_type", "gpt2"),
        (LLAMA, "model_type", "deepseek_v4"),
        (LLAMA, "model_type", None),
        (LLAMA, "architectures", ["LlamaForSequenceClassification"]),
        (V3, "index_topk", 2048),
        (V3, "index_n_heads", 64),
        (V3, "scoring_func", "softmax"),
        (V3, "topk_method", "greedy"),
        (V2, "scoring_func", "sigmoid"),
        (V2, "topk_method", "noaux_tc"),
        (V2, "rope_interleave", False),
        (V2, "num_nextn_predict_layers", 1),
        (LLAMA, "attention_multiplier", 0.5),
        (LLAMA, "residual_multiplier", 1),
        (LLAMA, "use_qk_norm", True),
        (QWEN2, "dual_chunk_attention_config", {"chunk_size": 1}),
        (LLAMA, "pruned_heads", {"0": [1]}),
    ],
)
def test_what_is_not_supported_is_named(raw: dict[str, Any], name: str, value: object):
    message = refusal(raw | {name: value})
    assert name in message
    if value is not None:
        assert json.dumps(value) in message


def test_harmless_and_empty_fields_pass():
    extra = {"use_cache": False, "transformers_version": "4.33.1", "auto_map": {"AutoConfig": "x"}}
    extra |= {"ep_size": 8, "pretraining_tp": 2, "aux_loss_alpha": 1e-3, "seq_aux": True}
    extra |= {"torch_dtype": "bfloat16", "attention_dropout": 0, "pad_token_id": -1, "top_k": 50}
    extra |= {"pruned_heads": {}, "use_qk_norm": False, "task_specific_params": None, "prefix": ""}
    assert config_from_hf(V3 | extra) == config_from_hf(V3)


@pytest.mark.parametrize("raw", [[], None, "{}", 3, {}])
def test_no_config_at_all(raw: object):
    refusal(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = sorted(
    {*V3, "rope_scaling", "rope_parameters", "quantization_config", "lowlat", "head_dim"}
)
FIELDS += ["eos_token_id", "layer_types", "sliding_window", "mlp_layer_types", "architectures"]


@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), JSON, max_size=3),
)
def test_any_json_is_read_or_refused_in_one_line(family: str, changes: dict[str, Any]):
    """A hostile file may cause no error but UserError, whatever its values are."""
    try:
        config = config_from_hf(FAMILIES[family] | changes)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert math.isfinite(config.softmax_scale_of(0))
