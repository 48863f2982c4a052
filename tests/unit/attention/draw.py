"""Small configs and random projections for the attention tests."""

from typing import Any

from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig


def MLA(**changes: Any) -> MLAConfig:
    fields = {
        "num_attention_heads": 3,
        "kv_lora_rank": 13,
        "q_lora_rank": None,
        "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 4,
        "v_head_dim": 7,
    }
    return MLAConfig(**(fields | changes))


def GQA(**changes: Any) -> GQAConfig:
    fields = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6}
    return GQAConfig(**(fields | changes))


def config_of(attention: MLAConfig | GQAConfig, *, layers: int, mtp: int = 0) -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v3" if isinstance(attention, MLAConfig) else "llama",
        hidden_size=11,
        intermediate_size=17,
        num_hidden_layers=layers,
        vocab_size=23,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        attention=attention,
        rope=RopeConfig(rope_theta=1e4),
        num_nextn_predict_layers=mtp,
    )
