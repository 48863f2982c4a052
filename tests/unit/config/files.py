"""Small config.json contents, one per family, with sizes that no two agree by luck."""

from typing import Any

import pytest

from lowlat.config.hf.reader import config_from_hf
from lowlat.utils.errors import UserError

COMMON: dict[str, Any] = {
    "hidden_size": 42,
    "intermediate_size": 29,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "vocab_size": 101,
    "max_position_embeddings": 211,
    "rms_norm_eps": 1e-5,
    "rope_theta": 777.0,
}
MLA = COMMON | {
    "q_lora_rank": 17,
    "kv_lora_rank": 13,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 11,
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 19,
    "first_k_dense_replace": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
V3 = MLA | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
V2 = MLA | {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}
GLM = {k: v for k, v in MLA.items() if k not in ("n_group", "topk_group", "first_k_dense_replace")}
GLM |= {"model_type": "glm4_moe_lite"}
DENSE_MLA = {
    name: value
    for name, value in MLA.items()
    if name in COMMON or name == "q_lora_rank" or name.endswith(("_dim", "kv_lora_rank"))
}
V32 = V3 | {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]}
V32 |= {"index_n_heads": 5, "index_head_dim": 10, "index_topk": 23}
GLM_DSA = V32 | {"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"]}
GLM_DSA |= {"indexer_types": ["full", "shared", "shared", "full", "shared"]}
YOUTU = DENSE_MLA | {"model_type": "youtu", "architectures": ["YoutuForCausalLM"]}
MINICPM3 = DENSE_MLA | {"model_type": "minicpm3", "architectures": ["MiniCPM3ForCausalLM"]}
MINICPM3 |= {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 6}
SCALED = {"rope_theta": 777.0, "rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1}
SCALED |= {"original_max_position_embeddings": 53}
MISTRAL4 = {name: value for name, value in MLA.items() if name != "rope_theta"}
MISTRAL4 |= {"model_type": "mistral4", "rope_parameters": SCALED}
LLAMA = COMMON | {"model_type": "llama"}
MISTRAL = COMMON | {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 31}
QWEN2 = COMMON | {"model_type": "qwen2", "num_key_value_heads": 3}
QWEN3 = COMMON | {"model_type": "qwen3", "num_key_value_heads": 3, "head_dim": 10}
FAMILIES = {
    "deepseek_v3": V3,
    "deepseek_v32": V32,
    "glm_moe_dsa": GLM_DSA,
    "kimi_k2": V3 | {"model_type": "kimi_k2"},
    "deepseek_v2": V2,
    "glm4_moe_lite": GLM,
    "mistral4": MISTRAL4,
    "axk1": V3 | {"model_type": "axk1", "architectures": ["AXK1ForCausalLM"]},
    "youtu": YOUTU,
    "minicpm3": MINICPM3,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}


def without(raw: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key != name}


def refusal(raw: object) -> str:
    """The one line with which `raw` is refused."""
    with pytest.raises(UserError) as caught:
        config_from_hf(raw, source="folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: ")
    assert "\n" not in message
    return message
