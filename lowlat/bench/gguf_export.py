"""A Hugging Face checkpoint of a DeepSeek-V2 or V3 model as the GGUF file llama.cpp reads.

Names and metadata are those of llama.cpp's own converter: kv_b_proj split by head into attn_k_b
(transposed) and attn_v_b, experts stacked, the cache of the absorbed form. There is no vocabulary:
whoever runs the file gives token ids. MTP modules are left out, as llama.cpp's converter does.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from lowlat.checkpoint.index import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.checkpoint.source import TensorSource
from lowlat.config.model import MLAConfig, ModelConfig, MoEConfig
from lowlat.utils.errors import UserError

ARCHITECTURE = "deepseek2"
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
KINDS = {"F32": GGMLQuantizationType.F32, "BF16": GGMLQuantizationType.BF16}

Part = tuple[str, tuple[int, ...], Callable[[], Tensor]]
"""A tensor to write: its name in the file, its shape, and how to read it."""


def export(model: Path, target: Path, kind: str) -> None:
    """Write the checkpoint folder `model` as `target`, matrices in `kind` (F32, BF16).

    The file appears whole or not at all. Raises UserError for a model that is none of DeepSeek's.
    """
    source = open_checkpoint(model)
    config = read_config(source)
    attention = config.attention
    if not isinstance(attention, MLAConfig) or not attention.kv_a_layernorm:
        raise UserError(
            f"{model}: llama.cpp reads GGUF files of DeepSeek-V2 and V3 only; leave llama.cpp out "
            "of --peers"
        )
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        _write(partial, config, attention, source, KINDS[kind])
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _write(
    path: Path,
    config: ModelConfig,
    attention: MLAConfig,
    source: TensorSource,
    kind: GGMLQuantizationType,
) -> None:
    writer = GGUFWriter(path, ARCHITECTURE)
    for key, value in metadata(config, attention).items():
        _add(writer, f"{ARCHITECTURE}.{key}", value)
    writer.add_tokenizer_model("none")
    parts = [(part, _kind(part, kind)) for part in _parts(config, attention, source)]
    for (name, shape, _), stored in parts:
        size = int(np.prod(shape)) * (2 if stored == GGMLQuantizationType.BF16 else 4)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (_, _, read), stored in parts:
        dtype = torch.bfloat16 if stored == GGMLQuantizationType.BF16 else torch.float32
        flat = read().to(dtype).contiguous().reshape(-1).view(torch.uint8)
        writer.write_tensor_data(flat.numpy())
    writer.close()


def _kind(part: Part, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors and the router stay fp32, as llama.cpp's converter leaves them."""
    name, shape, _ = part
    return GGMLQuantizationType.F32 if len(shape) == 1 or "ffn_gate_inp" in name else kind


def _parts(config: ModelConfig, attention: MLAConfig, source: TensorSource) -> Iterator[Part]:
    known = set(source.names())
    for name, target in OUTSIDE.items():
        if name in known:
            yield _plain(source, name, target)
    for layer in range(config.num_hidden_layers):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for module, target in MODULES.items():
            if (name := f"{prefix}{module}.weight") in known:
                yield _plain(source, name, f"{block}{target}.weight")
        if (bias := f"{prefix}mlp.gate.e_score_correction_bias") in known:
            yield _plain(source, bias, f"{block}exp_probs_b.bias")
        yield from _split(source, attention, f"{prefix}self_attn.kv_b_proj.weight", block)
        if config.moe is not None and config.is_moe_layer(layer):
            yield from _experts(source, config.moe, f"{prefix}mlp.experts.", block)


def _plain(source: TensorSource, name: str, target: str) -> Part:
    return target, source.shape(name), lambda: source.read(name)


def _split(source: TensorSource, attention: MLAConfig, name: str, block: str) -> Iterator[Part]:
    """attn_k_b [heads, latent, nope] and attn_v_b [heads, v, latent] of kv_b_proj."""
    heads, latent = attention.num_attention_heads, attention.kv_lora_rank
    nope, v_dim = attention.qk_nope_head_dim, attention.v_head_dim

    def by_head() -> Tensor:
        return source.read(name).unflatten(0, (heads, nope + v_dim))

    keys = (heads, latent, nope)
    yield f"{block}attn_k_b.weight", keys, lambda: by_head()[:, :nope].transpose(1, 2)
    yield f"{block}attn_v_b.weight", (heads, v_dim, latent), lambda: by_head()[:, nope:]


def _experts(source: TensorSource, moe: MoEConfig, prefix: str, block: str) -> Iterator[Part]:
    count = moe.n_routed_experts
    for module, target in EXPERTS.items():
        names = [f"{prefix}{expert}.{module}.weight" for expert in range(count)]
        yield (
            f"{block}{target}.weight",
            (count, *source.shape(names[0])),
            lambda names=names: torch.stack([source.read(name) for name in names]),
        )


def metadata(config: ModelConfig, attention: MLAConfig) -> dict[str, Any]:
    """The keys below the architecture's name. Raises UserError where the format has none."""
    latent, rope_dim = attention.kv_lora_rank, attention.qk_rope_head_dim
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": attention.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope_dim,
        "attention.value_length": latent,
        "attention.key_length_mla": attention.qk_head_dim,
        "attention.value_length_mla": attention.v_head_dim,
        "rope.dimension_count": rope_dim,
        "rope.freq_base": float(config.rope.rope_theta),
    }
    if attention.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = attention.q_lora_rank
    return keys | _expert_keys(config) | _rope_keys(config)


def _expert_keys(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {
            "leading_dense_block_count": config.num_hidden_layers,
            "expert_feed_forward_length": config.intermediate_size,
            "expert_shared_count": 0,
        }
    return {
        "leading_dense_block_count": moe.first_k_dense_replace,
        "expert_feed_forward_length": moe.moe_intermediate_size,
        "expert_count": moe.n_routed_experts,
        "expert_used_count": moe.num_experts_per_tok,
        "expert_shared_count": moe.n_shared_experts,
        "expert_group_count": moe.n_group,
        "expert_group_used_count": moe.topk_group,
        "expert_gating_func": 2 if moe.scoring_func == "sigmoid" else 1,
        "expert_weights_scale": float(moe.routed_scaling_factor),
        "expert_weights_norm": moe.norm_topk_prob,
    }


def _rope_keys(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    if rope.rope_type == "default":
        return {}
    if rope.rope_type != "yarn" or rope.mscale != rope.mscale_all_dim:
        raise UserError(
            f"rope_type '{rope.rope_type}' with these settings has no form in llama.cpp's files; "
            "leave llama.cpp out of --peers"
        )
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.factor),
        "rope.scaling.original_context_length": rope.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        "rope.scaling.yarn_log_multiplier": 0.1 * (rope.mscale_all_dim or 0.0),
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
