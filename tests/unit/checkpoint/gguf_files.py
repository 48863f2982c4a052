"""Small GGUF files with the gguf package as writer, laid out as llama.cpp's converter does it."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from torch import Tensor

from lowlat.checkpoint.mapping import operations
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, MoEConfig

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}
OWN_ARCHITECTURE = ("minicpm3", "mistral4")
"""Families with latent attention that are not deepseek2."""
EXPERT = re.compile(r"mlp\.experts\.\d+\.")


def write_gguf(
    path: Path,
    config: ModelConfig,
    parameters: dict[str, Tensor],
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    split_kv_b: bool = False,
    keys: dict[str, Any] | None = None,
    extra: dict[str, Tensor] | None = None,
    split: int = 0,
    small_first: bool = False,
) -> Path:
    """A GGUF file of the model: matrices in `kind`, vectors in fp32.

    `keys` adds or (None) leaves out metadata, `extra` adds tensors under their GGUF names. `split`:
    tensors per part of a split model, whose first part has none with `small_first`.
    """
    has_own = isinstance(config.attention, GQAConfig) or config.model_type in OWN_ARCHITECTURE
    arch = config.model_type if has_own else "deepseek2"
    writer = GGUFWriter(path, arch, split_max_tensors=split, small_first_shard=small_first)
    for key, value in (_metadata(config, arch, split_kv_b) | (keys or {})).items():
        _add_key(writer, key if "." in key else f"{arch}.{key}", value)
    tensors = _tensors(config, parameters, permute=arch == "llama")
    if split_kv_b:
        tensors = _split(config, tensors)
    for name, tensor in (tensors | (extra or {})).items():
        stored = GGMLQuantizationType.F32 if tensor.dim() == 1 else kind
        writer.add_tensor(name, quantize(tensor.float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def file_tensors(config: ModelConfig, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under Hugging Face names."""
    plan = operations(config, parameters)
    return dict(pair for step in plan for pair in step.save(parameters.__getitem__))


def _tensors(
    config: ModelConfig, parameters: dict[str, Tensor], *, permute: bool
) -> dict[str, Tensor]:
    """GGUF names and layouts; the experts of a layer are stacked."""
    found: dict[str, list[Tensor]] = {}
    for name, value in parameters.items():
        value, layer, rest = value.detach(), None, name
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
        elif name.startswith("mtp."):
            _, depth, rest = name.split(".", 2)
            layer = str(config.num_hidden_layers + int(depth))
            rest = rest.removeprefix("block.")
            rest = f"shared_head.{rest}" if rest.startswith(("norm.", "head.")) else rest
        rest, is_expert = EXPERT.subn("mlp.experts.", rest)
        value = _permuted(config, rest, value, permute)
        found.setdefault(_gguf_name(layer, rest), []).append(value[None] if is_expert else value)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _gguf_name(layer: str | None, rest: str) -> str:
    if layer is None:
        plain = {"embed_tokens.weight": "token_embd", "norm.weight": "output_norm"}
        return f"{plain.get(rest, 'output')}.weight"
    if rest == "mlp.gate.e_score_correction_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def _permuted(config: ModelConfig, rest: str, value: Tensor, permute: bool) -> Tensor:
    """llama.cpp's order of q and k rows: real and imaginary part of a pair are adjacent."""
    attention = config.attention
    if not permute or not isinstance(attention, GQAConfig):
        return value
    heads = {
        "self_attn.q_proj": attention.num_attention_heads,
        "self_attn.k_proj": attention.num_key_value_heads,
    }.get(rest.rpartition(".")[0])
    if heads is None:
        return value
    halves = value.reshape(heads, 2, attention.head_dim // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def _split(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """attn_kv_b as the absorbed form has it: k transposed and v, both by head."""
    attention = config.attention
    assert isinstance(attention, MLAConfig)
    result = {}
    for name, value in tensors.items():
        if "attn_kv_b" not in name:
            result[name] = value
            continue
        joint = value.view(attention.num_attention_heads, -1, attention.kv_lora_rank)
        nope = attention.qk_nope_head_dim
        result[name.replace("kv_b", "k_b")] = joint[:, :nope].transpose(1, 2).contiguous()
        result[name.replace("kv_b", "v_b")] = joint[:, nope:].contiguous()
    return result


def _metadata(config: ModelConfig, arch: str, split_kv_b: bool) -> dict[str, Any]:
    attention = config.attention
    keys: dict[str, Any] = {
        "block_count": config.num_cache_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": attention.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope.rope_theta,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_ids[0],
        "tokenizer.ggml.tokens": [f"token {index}" for index in range(config.vocab_size)],
    }
    if isinstance(attention, GQAConfig):
        keys["attention.head_count_kv"] = attention.num_key_value_heads
        keys["attention.key_length"] = keys["attention.value_length"] = attention.head_dim
        keys["rope.dimension_count"] = attention.head_dim
    else:
        keys |= _mla_metadata(config, attention, split_kv_b)
    return {key if key.startswith("tokenizer.") else f"{arch}.{key}": v for key, v in keys.items()}


def _mla_metadata(config: ModelConfig, attention: MLAConfig, split_kv_b: bool) -> dict[str, Any]:
    moe, latent = config.moe, attention.kv_lora_rank
    plain = {"key_length": attention.qk_head_dim, "value_length": attention.v_head_dim}
    absorbed = {"key_length": latent + attention.qk_rope_head_dim, "value_length": latent}
    lengths = absorbed | {f"{k}_mla": v for k, v in plain.items()} if split_kv_b else plain
    keys: dict[str, Any] = {
        "attention.head_count_kv": 1 if split_kv_b else attention.num_attention_heads,
        "attention.kv_lora_rank": latent,
        "rope.dimension_count": attention.qk_rope_head_dim,
    }
    if moe is not None:
        keys |= _expert_metadata(moe)
    keys |= {f"attention.{key}": value for key, value in lengths.items()}
    if attention.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = attention.q_lora_rank
    if config.num_nextn_predict_layers:
        keys["nextn_predict_layers"] = config.num_nextn_predict_layers
    return keys


def _expert_metadata(moe: MoEConfig) -> dict[str, Any]:
    return {
        "expert_count": moe.n_routed_experts,
        "expert_used_count": moe.num_experts_per_tok,
        "expert_shared_count": moe.n_shared_experts,
        "expert_feed_forward_length": moe.moe_intermediate_size,
        "expert_weights_scale": moe.routed_scaling_factor,
        "expert_weights_norm": moe.norm_topk_prob,
        "expert_gating_func": 2 if moe.scoring_func == "sigmoid" else 1,
        "expert_group_count": moe.n_group,
        "expert_group_used_count": moe.topk_group,
        "leading_dense_block_count": moe.first_k_dense_replace,
    }


class Typed(NamedTuple):
    """A value for `keys`, with its type in the file."""

    value: Any
    kind: GGUFValueType
    items: GGUFValueType | None = None


def _add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if key == "general.alignment":
        writer.add_custom_alignment(value)
    elif isinstance(value, Typed):
        writer.add_key_value(key, value.value, value.kind, sub_type=value.items)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def dequantised(tensor: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """What remains of `tensor` after storing it in `kind`."""
    from gguf.quants import dequantize

    return torch.from_numpy(np.array(dequantize(quantize(tensor.float().numpy(), kind), kind)))
