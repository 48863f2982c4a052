"""The published sizes of real models, to the printed digit, and counts against real modules."""

from dataclasses import replace

import pytest
import torch

from lowlat.config.hf.reader import config_from_hf
from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.model import MLAConfig, ModelConfig, QuantConfig
from lowlat.config.parameter_count import (
    attention_parameters,
    count_parameters,
    expert_parameters,
    moe_parameters,
)
from lowlat.config.presets import load_preset, preset_names
from lowlat.config.weight_memory import memory_at, weight_bytes
from lowlat.model.quant import store_packed
from lowlat.model.transformer import Transformer

from .files import FAMILIES, GLM, LLAMA, QWEN2, QWEN3, V3


def billions(count: int, digits: int) -> str:
    return f"{count / 1e9:.{digits}f}"


def test_deepseek_v3_by_part():
    config = load_preset("deepseek-v3")
    count = count_parameters(config)
    assert config.moe is not None
    assert billions(count.total, 3) == "671.026"
    assert billions(count.mtp, 3) == "11.610"
    assert billions(count.mtp + count.mtp_copies, 3) == "13.463"
    assert billions(count.total + count.mtp + count.mtp_copies, 2) == "684.49"
    assert billions(count.active_without_embedding, 2) == "36.63"
    assert billions(count.active, 2) == "37.55"
    assert f"{attention_parameters(config, 0) / 1e6:.2f}" == "187.11"
    assert count.attention == 61 * attention_parameters(config, 0)
    assert f"{expert_parameters(config) / 1e6:.2f}" == "44.04"
    assert billions(moe_parameters(config, config.moe), 3) == "11.320"
    assert billions(count.embedding, 4) == billions(count.head, 4) == "0.9267"


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v2", "235.74", "21.38"),
        ("deepseek-v2-lite", "15.706", None),
        ("moonlight-16b-a3b", "15.960", None),
        ("kimi-k2", "1026.4", "32.9"),
        ("glm-4.7-flash", "29.94", None),
        ("gigachat3-10b-a1.8b", "10.67", "1.8"),
        ("youtu-llm-2b", "1.96", None),
        ("minicpm3-4b", "4.07", None),
        ("mistral-small-4-119b", "119.0", "6.6"),
        ("a.x-k1", "519", "33"),
        ("kimi-k2.5", "1026.4", "32.9"),
        ("deepseek-v3.2", "671.88", None),
        ("glm-5", "743.91", "41.8"),
        ("glm-5.2", "743.38", "41.3"),
    ],
)
def test_totals_and_active(name: str, total: str, active: str | None):
    count = count_parameters(load_preset(name))
    assert billions(count.total, len(total.partition(".")[2])) == total
    if active is not None:
        assert billions(count.active, len(active.partition(".")[2])) == active


def test_v2_lite_active():
    """2.4B is the figure without the input embedding, cut rather than rounded (2.451)."""
    active = count_parameters(load_preset("deepseek-v2-lite")).active_without_embedding
    assert billions(active, 3) == "2.451"


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("deepseek-v3", 70_272),
        ("qwen2.5-72b", 327_680),
        ("llama-3.1-405b", 516_096),
        ("smollm2-135m", 23_040),
        ("deepseek-v3.2", 61 * (576 * 2 + 128 + 4)),
        ("glm-5", 78 * (576 * 2 + 128 + 4)),
    ],
)
def test_cache_per_token(name: str, bytes_per_token: int):
    cost = kv_cache_size(load_preset(name))
    assert cost.own_bytes_per_token("bf16") == bytes_per_token


def test_layers_that_share_a_choice_cache_no_index_key():
    cost = kv_cache_size(load_preset("glm-5.2"))
    assert cost.own_bytes_per_token("bf16") == 78 * 576 * 2 + 21 * (128 + 4)


def test_alternatives_of_deepseek_v3():
    """DeepSeek-V2 section 2.1.4: MLA caches d_c + d_R elements, GQA 2 n_g d_h."""
    cost = kv_cache_size(load_preset("deepseek-v3"))
    assert cost.elements_per_token_layer == 576
    assert (cost.mha, cost.gqa8, cost.mqa) == (2 * 128 * 128, 2 * 8 * 128, 2 * 128)
    assert cost.gqa_groups_equivalent == 2.25
    assert cost.bytes_per_token(cost.mqa, "fp32") == 256 * 61 * 4


def test_equivalent_groups_of_a_grouped_model_are_its_groups():
    assert kv_cache_size(load_preset("llama-3.1-8b")).gqa_groups_equivalent == 8.0
    assert kv_cache_size(load_preset("smollm2-135m")).gqa_groups_equivalent == 3.0
    few = kv_cache_size(config_from_hf(LLAMA))
    assert few.gqa8 == few.mha == 2 * 3 * 14


def test_tied_embedding_is_one_matrix_and_stays_active():
    count = count_parameters(load_preset("smollm2-135m"))
    assert count.total == 134_515_008
    assert (count.head, count.active_without_embedding) == (0, count.total)


CONFIGS = {
    **{name: config_from_hf(raw) for name, raw in FAMILIES.items()},
    "mtp": config_from_hf(V3 | {"num_nextn_predict_layers": 2}),
    "glm mtp": config_from_hf(GLM | {"num_nextn_predict_layers": 1}),
    "biased": config_from_hf(V3 | {"attention_bias": True}),
    "no query latent": config_from_hf(V3 | {"q_lora_rank": None, "attention_bias": True}),
    "no shared": config_from_hf(V3 | {"n_shared_experts": 0, "moe_layer_freq": 2}),
    "dense": config_from_hf(V3 | {"first_k_dense_replace": 5, "tie_word_embeddings": True}),
    "llama biased": config_from_hf(LLAMA | {"attention_bias": True, "head_dim": 8}),
    "qwen3 biased": config_from_hf(QWEN3 | {"attention_bias": True}),
}
PLAIN = CONFIGS["no query latent"]
assert isinstance(PLAIN.attention, MLAConfig)
CONFIGS["converted"] = replace(
    PLAIN,
    attention=replace(PLAIN.attention, kv_a_layernorm=False, attention_bias=False, q_bias=True),
)
CONFIGS["o bias"] = replace(
    PLAIN, attention=replace(PLAIN.attention, attention_bias=False, o_bias=True)
)


def modules_of(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_and_bytes_are_those_of_the_modules(name: str):
    config = CONFIGS[name]
    tensors = list(modules_of(config).state_dict().values())
    count = count_parameters(config)
    assert sum(tensor.numel() for tensor in tensors) == count.total + count.mtp
    assert sum(tensor.nbytes for tensor in tensors) == weight_bytes(config, "bf16")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_bytes_are_those_of_the_modules(name: str, dtype: str):
    config = CONFIGS[name]
    for copies in (False, True):
        config = replace(config, mtp_copies=copies and config.num_nextn_predict_layers > 0)
        model = modules_of(config)
        with torch.device("meta"):
            model.add_head()
        store_packed(model, dtype)
        tensors = model.state_dict().values()
        assert sum(tensor.nbytes for tensor in tensors) == weight_bytes(config, dtype)


@pytest.mark.parametrize(
    "name",
    ["deepseek_v3", "deepseek_v32", "glm_moe_dsa", "mtp", "no query latent", "no shared", "qwen2"],
)
def test_fp8_bytes_are_those_of_the_modules(name: str):
    quant = QuantConfig(weight_block_size=(8, 4))
    config = replace(CONFIGS[name], quantization=quant)
    tensors = modules_of(config).state_dict().values()
    assert sum(tensor.nbytes for tensor in tensors) == weight_bytes(config)


def test_copies_count_where_a_checkpoint_has_them():
    config = CONFIGS["mtp"]
    extra = weight_bytes(replace(config, mtp_copies=True), "fp32") - weight_bytes(config, "fp32")
    assert extra == 2 * 2 * 101 * 42 * 4


def test_memory():
    config = config_from_hf(QWEN2)
    memory = memory_at(config, 7, "fp32")
    assert memory["cache_bytes"] == 7 * 5 * (2 * 3 * 14) * 2
    assert memory["weights_bytes"] == count_parameters(config).total * 4
    assert memory["context"] == 7
    assert memory_at(config, 7)["weights_bytes"] * 2 == memory["weights_bytes"]


def test_int8_cache():
    """V3: 512 bytes, 8 scales, 64 bf16; QWEN2's [K ; V] of 84 elements: 84 bytes, 2 scales."""
    cost = kv_cache_size(config_from_hf(V3 | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}))
    assert cost.own_bytes_per_token("int8") == cost.num_layers * (512 + 32 + 128)
    assert cost.bytes_per_token(70, "int8") == cost.num_layers * (72 + 8)
    config = config_from_hf(QWEN2)
    assert kv_cache_size(config).own_bytes_per_token("int8") == 5 * (84 + 8)
    assert memory_at(config, 7, "int4", "int8")["cache_bytes"] == 7 * 5 * 92


def test_numbers_stay_fast_for_absurd_sizes():
    """A hostile file may claim 2**31 experts: counting must not make a list of them."""
    config = config_from_hf(V3 | {"n_routed_experts": 3 * 2**29, "num_hidden_layers": 10_000})
    quantized = replace(config, quantization=QuantConfig())
    assert weight_bytes(quantized) > 2**50


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_positive_parts(name: str):
    count = count_parameters(load_preset(name))
    assert 0 < count.active_without_embedding <= count.active <= count.total
