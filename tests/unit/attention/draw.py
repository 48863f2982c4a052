"""Small configs and random projections for the attention tests."""

from dataclasses import replace
from typing import Any

from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig
from tests import configs


def MLA(**changes: Any) -> MLAConfig:
    return replace(configs.MLA, **({"q_lora_rank": None, "qk_rope_head_dim": 4} | changes))


def GQA(**changes: Any) -> GQAConfig:
    return replace(configs.GQA, **({"head_dim": 6} | changes))


def config_of(attention: MLAConfig | GQAConfig, *, layers: int, mtp: int = 0) -> ModelConfig:
    return configs.model_config(
        "deepseek_v3" if isinstance(attention, MLAConfig) else "llama",
        attention,
        hidden_size=11,
        num_hidden_layers=layers,
        rms_norm_eps=1e-6,
        num_nextn_predict_layers=mtp,
    )
