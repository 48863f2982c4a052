"""Random tiny configs of every family, drawn by seed: odd and prime sizes, all rules that
families may combine.

Owns what is drawn. Building the models and comparing them is `oracle`'s.
"""

import random
from dataclasses import dataclass
from typing import Any

from transformers import (
    AXK1Config,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Glm4MoeLiteConfig,
    GlmMoeDsaConfig,
    LlamaConfig,
    MiniCPM3Config,
    Mistral4Config,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    YoutuConfig,
)

COUNTS = {
    "deepseek_v3": 16,
    "deepseek_v2": 9,
    "kimi_k2": 7,
    "glm4_moe_lite": 8,
    "llama": 7,
    "mistral": 5,
    "qwen2": 5,
    "qwen3": 5,
    "youtu": 4,
    "minicpm3": 5,
    "mistral4": 5,
    "axk1": 5,
    "deepseek_v32": 9,
    "glm_moe_dsa": 9,
}
"""Configs per family."""

SPARSE_FAMILIES = ("deepseek_v32", "glm_moe_dsa")
MTP_FAMILIES = ("deepseek_v3", "kimi_k2", "glm4_moe_lite", *SPARSE_FAMILIES)
DENSE_FAMILIES = ("youtu", "minicpm3")
MLA_FAMILIES = ("deepseek_v2", *MTP_FAMILIES, *DENSE_FAMILIES, "mistral4", "axk1")
STARTS = (0, 1, 7_001, 59_999)
"""First positions of the compared tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One drawn model."""

    name: str
    family: str
    seed: int
    config: PreTrainedConfig
    """What the oracle is built from; kimi_k2 is a DeepseekV3Config."""
    mtp: int
    """MTP modules in the checkpoint."""
    mtp_copies: bool
    """Whether they bring the embedding and the head along."""
    start: int
    """Position of the first token."""
    bias_shift: float
    """Added to the router biases: far below zero, every biased score is negative."""


def all_cases() -> list[Case]:
    return [draw_case(family, index) for family, count in COUNTS.items() for index in range(count)]


def draw_case(family: str, index: int) -> Case:
    rng = random.Random(f"{family} {index}")
    mtp = rng.choice([0, 1, 2]) if family in MTP_FAMILIES else 0
    config = _mla_config(rng, family, mtp) if family in MLA_FAMILIES else _gqa_config(rng, family)
    config.tie_word_embeddings = rng.random() < 0.4
    config.initializer_range = 0.02
    return Case(
        name=f"{family}-{index}",
        family=family,
        seed=rng.randrange(2**31),
        config=config,
        mtp=mtp,
        mtp_copies=rng.random() < 0.5,
        start=STARTS[index % len(STARTS)],
        bias_shift=rng.choice([0.0, -0.2, -2.0]),
    )


def _mla_config(rng: random.Random, family: str, mtp: int) -> PreTrainedConfig:
    heads, layers = rng.choice([2, 3, 5]), rng.choice([2, 3])
    fields: dict[str, Any] = {
        "vocab_size": rng.choice([53, 97, 131]),
        # DeepseekV2Config wants a multiple of the heads
        "hidden_size": heads * rng.choice([7, 11, 13]),
        "intermediate_size": rng.choice([19, 37]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": rng.choice([5, 13, 17]),
        "q_lora_rank": rng.choice([None, 7, 11, 19]),
        "qk_nope_head_dim": rng.choice([1, 3, 7, 11]),
        "qk_rope_head_dim": rng.choice([2, 6, 10, 16]),
        "v_head_dim": rng.choice([1, 5, 9]),
        "attention_bias": rng.random() < 0.4,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
    }
    fields["rope_parameters"] = _mla_rope(rng, family, fields["qk_rope_head_dim"])
    fields["max_position_embeddings"] = _context(fields["rope_parameters"])
    if family in DENSE_FAMILIES:
        return _dense(rng, family, fields)
    fields |= _experts(rng, family)
    if family == "deepseek_v2":
        # The oracle views pairs as complex numbers in place, which wants even rows.
        fields["qk_nope_head_dim"] += 1
        fields["kv_lora_rank"] += 1
        dense = rng.randrange(layers + 1)
        return DeepseekV2Config(**fields, first_k_dense_replace=dense)
    dense = rng.randrange(layers)
    if family in SPARSE_FAMILIES:
        return _sparse(rng, family, fields | {"first_k_dense_replace": dense}, mtp)
    fields["rope_interleave"] = rng.random() < 0.7
    if family == "mistral4":
        fields["rope_parameters"]["llama_4_scaling_beta"] = rng.choice([0.1, 0.5])
        # few tokens, so that the scale changes between compared positions
        fields["rope_parameters"]["original_max_position_embeddings"] = rng.choice([11, 4096])
        return Mistral4Config(**fields, first_k_dense_replace=dense)
    if family not in ("glm4_moe_lite", "axk1"):
        fields |= {"num_nextn_predict_layers": mtp, "first_k_dense_replace": dense}
        return DeepseekV3Config(**fields)
    kinds = ["dense"] * dense + ["sparse"] * (layers - dense)
    if layers == 3 and rng.random() < 0.6:
        kinds = ["sparse", "dense", "sparse"]
    if family == "axk1":
        fields["q_lora_rank"] = fields["q_lora_rank"] or 7
        return AXK1Config(**fields, mlp_layer_types=kinds)
    # Not a field of the oracle's class, but of its MTP model and of released files
    fields |= {"num_mtp_layers": mtp, "mtp_mlp_layer_types": ["sparse"] * mtp}
    return Glm4MoeLiteConfig(**fields, mlp_layer_types=kinds)


def _sparse(rng: random.Random, family: str, fields: dict[str, Any], mtp: int) -> PreTrainedConfig:
    """Top-k below, at and above the number of compared tokens, which is 23."""
    # What the oracle's MTP model needs, which these families have none of
    fields |= {"num_mtp_layers": mtp, "mtp_mlp_layer_types": ["sparse"] * mtp}
    fields["mtp_layer_types"] = ["full_attention"] * mtp
    fields["q_lora_rank"] = fields["q_lora_rank"] or 7
    fields |= {
        "index_n_heads": rng.choice([1, 2, 3, 7]),
        "index_head_dim": fields["qk_rope_head_dim"] + rng.choice([0, 3, 6]),
        "index_topk": rng.choice([1, 2, 5, 11, 11, 23, 23, 40]),
    }
    if family == "deepseek_v32":
        return DeepseekV32Config(**fields)
    layers = fields["num_hidden_layers"]
    types = ["full", *(rng.choice(["full", "shared", "shared"]) for _ in range(layers - 1))]
    return GlmMoeDsaConfig(**fields, indexer_types=types)


def _dense(rng: random.Random, family: str, fields: dict[str, Any]) -> PreTrainedConfig:
    if family == "youtu":
        return YoutuConfig(**fields, rope_interleave=rng.random() < 0.7)
    scales = {
        "scale_emb": rng.choice([12, 3.5]),
        "scale_depth": rng.choice([None, 1.4, 0.7]),
        "dim_model_base": rng.choice([None, 5, 17]),
    }
    return MiniCPM3Config(**fields, **scales)


def _experts(rng: random.Random, family: str) -> dict[str, Any]:
    groups, per_group = rng.choice([(1, 7), (1, 12), (2, 3), (3, 5), (4, 3), (8, 2)])
    if family == "kimi_k2":
        groups, per_group = 1, groups * per_group
    kept = rng.randint(1, groups)
    fields = {
        "n_routed_experts": groups * per_group,
        "num_experts_per_tok": rng.randint(1, min(kept * per_group, 4)),
        "n_shared_experts": rng.choice([1, 2]),
        "moe_intermediate_size": rng.choice([3, 11, 29]),
        "routed_scaling_factor": rng.choice([1.0, 1.8, 2.5]),
        "n_group": groups,
        "topk_group": kept,
    }
    if family == "deepseek_v2":
        # The oracle ignores norm_topk_prob; tests/unit/ops/test_routing.py has V2's rule by hand.
        method = "greedy" if groups == 1 else "group_limited_greedy"
        return fields | {"norm_topk_prob": False, "topk_method": method}
    return fields | {"norm_topk_prob": rng.random() < 0.7}


def _longrope(rng: random.Random, dim: int) -> dict[str, Any]:
    """Short and long factors; the compared positions lie on either side of the original context."""
    names = ("short_factor", "long_factor")
    factors = {name: [rng.uniform(0.8, 40.0) for _ in range(dim // 2)] for name in names}
    return factors | {
        "rope_type": "longrope",
        "factor": rng.choice([1.0, 4.0]),
        "original_max_position_embeddings": rng.choice([512, 4096]),
    }


def _mla_rope(rng: random.Random, family: str, dim: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": rng.choice([1e4, 5e4, 1e6])}
    if family == "minicpm3":
        return _longrope(rng, dim) | {"rope_theta": rope["rope_theta"]}
    if rng.random() < 0.25:
        return rope
    mscale, all_dim = rng.choice([(1.0, 1.0), (0.707, 0.707), (0.7, 1.0), (1.0, 0.4), (1.3, None)])
    rope |= {
        "rope_type": "yarn",
        "factor": rng.choice([4.0, 16.0, 40.0]),
        "original_max_position_embeddings": rng.choice([512, 4096]),
        "beta_fast": 1.0 if family == "kimi_k2" else 32.0,
        "beta_slow": 1.0,
        "mscale": mscale,
    }
    return rope if all_dim is None else rope | {"mscale_all_dim": all_dim}


def _gqa_config(rng: random.Random, family: str) -> PreTrainedConfig:
    kv_heads, layers = rng.choice([1, 2, 3]), rng.choice([2, 3])
    heads = kv_heads * rng.choice([1, 2, 3])
    head_dim = rng.choice([2, 6, 10, 16])
    fields: dict[str, Any] = {
        "vocab_size": rng.choice([53, 97, 131]),
        # Qwen2 derives head_dim, and llama's config wants a multiple of the heads
        "hidden_size": heads * (head_dim if family == "qwen2" else rng.choice([7, 11, 13])),
        "intermediate_size": rng.choice([19, 37]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "rope_parameters": _gqa_rope(rng),
    }
    fields["max_position_embeddings"] = _context(fields["rope_parameters"])
    if family == "qwen2":
        return Qwen2Config(**fields, **_windows(rng, layers))
    fields["head_dim"] = head_dim
    if family == "mistral":
        return MistralConfig(**fields, sliding_window=rng.choice([None, 1, 5, 4096]))
    fields["attention_bias"] = rng.random() < 0.5
    if family == "llama":
        return LlamaConfig(**fields)
    return Qwen3Config(**fields, **_windows(rng, layers))


def _windows(rng: random.Random, layers: int) -> dict[str, Any]:
    if rng.random() < 0.4:
        return {"use_sliding_window": False}
    window, first = rng.choice([1, 4, 7]), rng.randrange(layers + 1)
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": first}


def _gqa_rope(rng: random.Random) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": rng.choice([1e4, 1e5, 5e5])}
    kind = rng.choice(["default", "linear", "llama3", "llama3", "yarn"])
    if kind == "default":
        return rope
    rope |= {"rope_type": kind, "factor": rng.choice([2.0, 8.0])}
    if kind == "llama3":
        low = rng.choice([1.0, 2.0])
        rope |= {"low_freq_factor": low, "high_freq_factor": 4.0}
    if kind != "linear":
        rope["original_max_position_embeddings"] = rng.choice([128, 2048])
    return rope


def _context(rope: dict[str, Any]) -> int:
    """The extended context; the compared positions may lie beyond it, which no rule looks at."""
    return int(rope.get("factor", 1.0) * rope.get("original_max_position_embeddings", 65_536))
