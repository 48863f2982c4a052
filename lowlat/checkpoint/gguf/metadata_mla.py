"""GGUF metadata -> config fields of models with Multi-head Latent Attention (MLA): architectures
deepseek2 (V2, V3 and their relatives), deepseek32 (V3.2), glm-dsa (GLM-5), mistral4 and minicpm3.
"""

from collections.abc import Iterable
from typing import Any

from lowlat.checkpoint.gguf.metadata_keys import Keys, KeysAndTensors

MISTRAL4, MINICPM3 = "mistral4", "minicpm3"
SPARSE = {"deepseek32": "deepseek_v32", "glm-dsa": "glm_moe_dsa"}
"""Architectures with sparse attention (DSA), and their model_type."""
LONG_CONTEXT = 2**20
"""glm-dsa files of this context or more that list no indexers have those of GLM-5.2."""
ABSORBED = ("deepseek2", MISTRAL4, *SPARSE)
"""Architectures whose files store kv_b_proj as attn_k_b and attn_v_b; older ones as attn_kv_b."""
MINICPM3_SCALES = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256}
"""Factors that llama.cpp computes minicpm3 with; the format has no keys for them."""
GATES = {1: "softmax", 2: "sigmoid"}
EXPERT_NUMBERS = (
    "expert_used_count",
    "expert_shared_count",
    "expert_feed_forward_length",
    "expert_group_used_count",
)
"""Keys without effect in a model without experts."""


def mtp_layers(file: KeysAndTensors, blocks: Iterable[int]) -> int:
    """Number of MTP modules, which are the last ones of the blocks."""
    return sum(f"blk.{block}.nextn.eh_proj.weight" in file.tensors for block in blocks)


def minicpm3(keys: Keys) -> dict[str, Any]:
    """Fields of MiniCPM3 but the RoPE; llama.cpp computes with constant factors."""
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    if keys.integer("attention.head_count_kv", heads) != heads:
        raise keys.error("attention.head_count_kv", f"must be {heads}")
    rope_dim, key_length = _rope_width(keys)
    return {
        "model_type": "minicpm3",
        "num_key_value_heads": heads,
        "attention_bias": False,
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "q_lora_rank": keys.integer("attention.q_lora_rank"),
        "qk_nope_head_dim": key_length - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": keys.integer("attention.value_length", hidden // heads if heads else 0),
        **MINICPM3_SCALES,
    }


def deepseek(file: KeysAndTensors, keys: Keys, arch: str) -> dict[str, Any]:
    """Fields but the RoPE of Mistral 4, DeepSeek V2 or V3; the gate function distinguishes the
    last two: softmax or sigmoid.
    """
    layers, mtp = _layer_counts(file, keys)
    heads = keys.integer("attention.head_count")
    if keys.integer("attention.head_count_kv", heads) not in (1, heads):
        raise keys.error("attention.head_count_kv", f"must be 1 or {heads}")
    return {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": mtp,
        "num_key_value_heads": heads,
        "attention_bias": False,
        **_latent_sizes(keys),
        **_experts(keys, arch),
    }


def indexers(keys: Keys, arch: str, config: dict[str, Any]) -> dict[str, Any]:
    """Sparse attention; glm-dsa lists the layers that have an indexer."""
    if config["model_type"] != "deepseek_v3":
        raise keys.error("expert_gating_func", f"must be 2, sigmoid, in architecture {arch}")
    found: dict[str, Any] = {
        "model_type": SPARSE[arch],
        "index_n_heads": keys.integer("attention.indexer.head_count"),
        "index_head_dim": keys.integer("attention.indexer.key_length"),
        "index_topk": keys.integer("attention.indexer.top_k"),
    }
    types = keys.numbers("attention.indexer.types")
    if types is not None:
        found["indexer_types"] = ["full" if number else "shared" for number in types]
    elif arch == "glm-dsa" and config["max_position_embeddings"] >= LONG_CONTEXT:
        found |= {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    return found


def _layer_counts(file: KeysAndTensors, keys: Keys) -> tuple[int, int]:
    """Numbers of layers and of MTP modules: the last blocks. Files made without the modules may
    still declare and count them.
    """
    blocks = keys.integer("block_count")
    first = max(blocks - keys.integer("nextn_predict_layers", 0), 0)
    mtp = mtp_layers(file, range(first, blocks))
    if any(name.startswith(f"blk.{first}.") for name in file.tensors):
        return blocks - mtp, mtp
    return first, mtp


def _latent_sizes(keys: Keys) -> dict[str, Any]:
    """Head sizes: the `_mla` keys if the file stores absorbed MLA, else the plain ones."""
    rank = keys.integer("attention.kv_lora_rank")
    rope_dim, key_length = _rope_width(keys)
    value_length = keys.integer("attention.value_length")
    if "attention.key_length_mla" in keys.values:
        if (key_length, value_length) != (rank + rope_dim, rank):
            raise keys.error(
                "attention.key_length", f"must be kv_lora_rank + rope width = {rank + rope_dim}"
            )
        rope_dim, key_length = _rope_width(keys, "attention.key_length_mla")
        value_length = keys.integer("attention.value_length_mla")
    return {
        "kv_lora_rank": rank,
        "q_lora_rank": keys.integer("attention.q_lora_rank", 0) or None,
        "qk_nope_head_dim": key_length - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": value_length,
    }


def _rope_width(keys: Keys, name: str = "attention.key_length") -> tuple[int, int]:
    """Rotated and all channels of a head."""
    rope_dim, key_length = keys.integer("rope.dimension_count"), keys.integer(name)
    if key_length < rope_dim:
        raise keys.error(name, f"{key_length} is less than the rope width {rope_dim}")
    return rope_dim, key_length


def _experts(keys: Keys, arch: str) -> dict[str, Any]:
    """Routing. The format's defaults are no expert groups, and softmax as the gate."""
    gate = keys.integer("expert_gating_func", 1)
    if gate not in GATES:
        raise keys.error(
            "expert_gating_func", f"{gate} is not supported; 1 is softmax, 2 is sigmoid"
        )
    sigmoid = GATES[gate] == "sigmoid"
    if arch == MISTRAL4 and sigmoid:
        raise keys.error("expert_gating_func", "sigmoid is not supported in mistral4 files")
    groups = max(keys.integer("expert_group_count", 1), 1)
    family = MISTRAL4 if arch == MISTRAL4 else "deepseek_v3" if sigmoid else "deepseek_v2"
    softmax_method = "group_limited_greedy" if groups > 1 else "greedy"
    blocks, dense = keys.integer("block_count"), keys.integer("leading_dense_block_count")
    if dense >= blocks and not keys.integer("expert_count", 0):
        for key in (*EXPERT_NUMBERS, "expert_weights_norm", "expert_weights_scale"):
            keys.read.add(key)
        return {"model_type": family, "n_routed_experts": None, "first_k_dense_replace": dense}
    return {
        "model_type": family,
        "scoring_func": GATES[gate],
        "topk_method": softmax_method if family == "deepseek_v2" else "noaux_tc",
        "n_group": groups,
        "topk_group": max(keys.integer("expert_group_used_count", 1), 1),
        "n_routed_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "n_shared_experts": keys.integer("expert_shared_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "norm_topk_prob": keys.boolean("expert_weights_norm", False),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
    }
