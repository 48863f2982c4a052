"""Exact conversion of MHA, GQA and MQA to Multi-head Latent Attention: config and tensors.

The values of all groups become the shared latent (G * d channels), the keys of all groups the
shared rotary key (G * d channels). A head's query is zero outside its group, and kv_b_proj selects
its group's values. The KV cache keeps its size and the function is the same. Every weight is a
copy, so no data type loses precision. Layout: docs/decisions/0002-exact-conversion-layout.md.
"""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from lowlat.checkpoint.mapping_operations import Read
from lowlat.config.attention import short_name
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig
from lowlat.convert.parameters.shared_rope import channel_order, half_order, wide_rope
from lowlat.ops.rope import inverse_frequencies, rotation_magnitude
from lowlat.utils.errors import UserError


def check_exact(config: ModelConfig, file: Path | None = None) -> GQAConfig:
    """The attention of `config`, read from `file`. Raises UserError if it has no exact MLA."""
    attention, where = config.attention, f"{file}: " if file else ""
    if isinstance(attention, MLAConfig | tuple):
        raise UserError(
            f"{where}model_type '{config.model_type}' already has Multi-head Latent Attention; "
            "--to mla converts MHA, GQA and MQA models"
        )
    if not isinstance(attention, GQAConfig):
        raise UserError(
            f"{where}the model's attention is {short_name(attention)}; --to mla converts MHA, GQA "
            "and MQA models"
        )
    if attention.qk_norm:
        raise UserError(
            f"{where}model_type '{config.model_type}' normalises every key head (QK-norm), so its "
            "keys are no linear map of the hidden state and --to mla cannot be exact; use a llama, "
            "mistral or qwen2 model"
        )
    if config.rope_of(0).long_pair_factors is not None:
        raise UserError(
            f"{where}long_factor differs from short_factor, and a converted model has one set; "
            "give both the factors of the context that you serve"
        )
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        raise UserError(
            f"{where}sliding_window {window} is shorter than max_position_embeddings "
            f"{config.max_position_embeddings}, and a deepseek_v3 model sees its whole context; "
            f"set max_position_embeddings to {window} in config.json to convert it for that context"
        )
    return attention


def mla_config(config: ModelConfig) -> ModelConfig:
    """`config` with exact MLA. Raises UserError if its attention cannot be expressed so."""
    source = check_exact(config)
    width = source.num_key_value_heads * source.head_dim
    rope = config.rope_of(0)  # equal in all GQA layers
    wide = wide_rope(
        inverse_frequencies(rope, source.head_dim),
        rotation_magnitude(rope),
        source.num_key_value_heads,
        config.max_position_embeddings,
    )
    return replace(
        config,
        model_type="deepseek_v3",
        attention=mla_attention_config(source, latent=width, nope=0, rope=width),
        rope=wide,
        quantization=None,
        sliding_window=None,
        sliding_window_layers=None,
    )


def mla_attention_config(source: GQAConfig, *, latent: int, nope: int, rope: int) -> MLAConfig:
    """MLA with the heads and biases of `source`, and the given channels of the latent, of a head's
    NoPE part and of the rotary key.
    """
    return MLAConfig(
        num_attention_heads=source.num_attention_heads,
        kv_lora_rank=latent,
        q_lora_rank=None,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=source.head_dim,
        attention_bias=source.qkv_bias,
        q_bias=source.qkv_bias,
        o_bias=source.o_bias,
        kv_a_layernorm=False,
    )


def expand_queries(
    queries: Shaped[Tensor, "rows *inputs"], source: GQAConfig
) -> Shaped[Tensor, "wide_rows *inputs"]:
    """q_proj weight or bias [heads * d, ...] -> [heads * G * d, ...], zero outside the group."""
    heads, groups = source.num_attention_heads, source.num_key_value_heads
    head_dim = source.head_dim
    width = groups * head_dim
    order = channel_order(groups, head_dim)
    group = torch.arange(heads) // (heads // groups)
    targets = torch.arange(heads)[:, None] * width + order[group]
    wide = queries.new_zeros(heads * width, *queries.shape[1:])
    wide[targets.flatten()] = queries
    return wide


def join_keys_values(
    keys: Shaped[Tensor, "rows *inputs"], values: Shaped[Tensor, "rows *inputs"], source: GQAConfig
) -> Shaped[Tensor, "joint_rows *inputs"]:
    """k_proj, v_proj (weights or biases) [G * d, ...] -> kv_a_proj_with_mqa [2 * G * d, ...].

    The latent (values) comes first, then the shared rotary key in `channel_order`.
    """
    order = channel_order(source.num_key_value_heads, source.head_dim)
    shared = torch.empty_like(keys)
    shared[order.flatten()] = keys
    return torch.cat([values, shared])


def select_values(source: GQAConfig, dtype: torch.dtype) -> Float[Tensor, "value_rows latent"]:
    """kv_b_proj [heads * d, G * d]: ones that select the value channels of each head's group."""
    heads, groups = source.num_attention_heads, source.num_key_value_heads
    groups_of_heads = torch.eye(groups).repeat_interleave(heads // groups, dim=0)
    return torch.kron(groups_of_heads, torch.eye(source.head_dim)).to(dtype)


def mla_attention(tensors: dict[str, Tensor], source: GQAConfig) -> dict[str, Tensor]:
    """One layer's self_attn tensors (`q_proj.weight`, ...) as exact MLA, without a latent norm."""
    converted: dict[str, Tensor] = {}
    for kind in ("weight", "bias") if source.qkv_bias else ("weight",):
        keys, values = tensors[f"k_proj.{kind}"], tensors[f"v_proj.{kind}"]
        converted[f"q_proj.{kind}"] = expand_queries(tensors[f"q_proj.{kind}"], source)
        converted[f"kv_a_proj_with_mqa.{kind}"] = join_keys_values(keys, values, source)
    converted["kv_b_proj.weight"] = select_values(source, tensors["v_proj.weight"].dtype)
    output = tensors["o_proj.weight"]
    converted["o_proj.weight"] = output
    if source.o_bias:
        converted["o_proj.bias"] = tensors["o_proj.bias"]
    elif source.qkv_bias:
        # attention_bias puts a bias on kv_a_proj_with_mqa and on o_proj, or on neither
        converted["o_proj.bias"] = output.new_zeros(len(output))
    return converted


def attention_names(source: GQAConfig) -> list[str]:
    """Names below self_attn of the tensors `mla_attention` needs."""
    names = [f"{name}_proj.weight" for name in "qkvo"]
    names += [f"{name}_proj.bias" for name in "qkv" if source.qkv_bias]
    return names + ["o_proj.bias"] * source.o_bias


def mla_parameters(read: Read, source: GQAConfig, rope: RopeConfig) -> Read:
    """Wrap `read`, which reads the source's parameters, into a function that reads those of the
    converted model. rope: that of the source.

    Names are the model's (`layers.0.self_attn.q_proj.weight`). One layer's attention is cached, so
    read parameters layer by layer.
    """
    held: dict[str, dict[str, Tensor]] = {}
    order = half_order(rope, source.head_dim)

    def in_half_layout(name: str) -> Tensor:
        rows = read(name)
        is_rotated = name.rpartition(".")[0].endswith(("q_proj", "k_proj"))
        if not (is_rotated and rope.rope_interleave):
            return rows
        return rows.unflatten(0, (-1, source.head_dim))[:, order].flatten(0, 1)

    def converted(parameter: str) -> Tensor:
        prefix, _, below = parameter.rpartition("self_attn.")
        if not prefix:
            return read(parameter)
        if prefix not in held:
            held.clear()
            names = attention_names(source)
            tensors = {name: in_half_layout(f"{prefix}self_attn.{name}") for name in names}
            held[prefix] = mla_attention(tensors, source)
        return held[prefix][below]

    return converted
