"""Tensor names and layouts of GGUF files, and how their tensors are computed from parameters.

Block N of a file is layer N: `blk.N.attn_norm` is `model.layers.N.input_layernorm`. The layouts are
those of llama.cpp's converter: experts stacked, q and k rows of llama permuted so that RoPE pairs
are adjacent, kv_b_proj split by head into attn_k_b (transposed) and attn_v_b (not in minicpm3).
`source` reads them;
`metadata_writer` decides which models have a GGUF form.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lowlat.checkpoint.gguf.metadata_mla import ABSORBED
from lowlat.checkpoint.mapping import file_name
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.shared_head_norm": "shared_head.norm",
    "nextn.shared_head_head": "shared_head.head",
}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Modules of a block whose three-dimensional tensors hold all experts."""
ROUTER_BIAS = "exp_probs_b"
BY_NAME = {hf: gguf for gguf, hf in GLOBAL_NAMES.items()}
BY_MODULE = {hf: gguf for gguf, hf in MODULES.items()}
BY_EXPERT = {hf: gguf for gguf, hf in EXPERTS.items()}
ROPE_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS)
"""Tensors that are fields of the config."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)\.weight")


class GGUFTensorMapping(NamedTuple):
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """Slowest axis first."""
    parameters: tuple[str, ...]
    """Concatenated in this order."""
    change: Callable[[Tensor], Tensor] | None
    """Applied to each parameter; None: unchanged."""


def gguf_tensor_mappings(
    config: ModelConfig, arch: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[GGUFTensorMapping]:
    """The tensors of the model whose parameters have `shapes`, in their order."""
    for parameter, shape in shapes.items():
        name = file_name(config, parameter)
        match = _LAYER.fullmatch(name)
        if match is None:
            yield GGUFTensorMapping(BY_NAME[name], shape, (parameter,), None)
        elif (expert := _EXPERT.fullmatch(match[2])) is None:
            yield from _of_layer(config, arch, match, parameter, shape)
        elif expert[1] == "0":
            yield _stacked(config, match[1], expert[2], parameter, shape)


def _of_layer(
    config: ModelConfig, arch: str, match: re.Match[str], parameter: str, shape: tuple[int, ...]
) -> Iterator[GGUFTensorMapping]:
    block, name = f"blk.{match[1]}.", match[2]
    if name == "mlp.gate.e_score_correction_bias":
        yield GGUFTensorMapping(f"{block}{ROUTER_BIAS}.bias", shape, (parameter,), None)
        return
    module, _, kind = name.rpartition(".")
    attention = config.attention_of(0)
    is_latent = isinstance(attention, MLAConfig)
    if module == "self_attn.kv_b_proj" and is_latent and arch in ABSORBED:
        yield from _split(attention, block, parameter)
        return
    change = None
    if arch == "llama" and isinstance(attention, GQAConfig):
        if module == "self_attn.q_proj":
            change = partial(permute, heads=attention.num_attention_heads)
        elif module == "self_attn.k_proj":
            change = partial(permute, heads=attention.num_key_value_heads)
    yield GGUFTensorMapping(f"{block}{BY_MODULE[module]}.{kind}", shape, (parameter,), change)


def _stacked(
    config: ModelConfig, layer: str, module: str, parameter: str, shape: tuple[int, ...]
) -> GGUFTensorMapping:
    assert config.moe is not None
    count = config.moe.n_routed_experts
    head, _, tail = parameter.rpartition(".experts.0.")
    names = tuple(f"{head}.experts.{expert}.{tail}" for expert in range(count))
    return GGUFTensorMapping(
        f"blk.{layer}.{BY_EXPERT[module]}.weight", (count, *shape), names, None
    )


def _split(attention: MLAConfig, block: str, parameter: str) -> Iterator[GGUFTensorMapping]:
    """attn_k_b [heads, latent, nope] and attn_v_b [heads, v, latent]."""
    heads, latent = attention.num_attention_heads, attention.kv_lora_rank
    nope, v_dim = attention.qk_nope_head_dim, attention.v_head_dim

    def keys(joint: Tensor) -> Tensor:
        return joint.unflatten(0, (heads, nope + v_dim))[:, :nope].transpose(1, 2)

    def values(joint: Tensor) -> Tensor:
        return joint.unflatten(0, (heads, nope + v_dim))[:, nope:]

    yield GGUFTensorMapping(f"{block}attn_k_b.weight", (heads, latent, nope), (parameter,), keys)
    yield GGUFTensorMapping(f"{block}attn_v_b.weight", (heads, v_dim, latent), (parameter,), values)


def permute(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from Hugging Face's order (real parts, then imaginary) to pairs."""
    # [heads * 2 * pairs, ...] -> heads x 2 x pairs -> heads x pairs x 2
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Reverse of `permute`."""
    # [heads * pairs * 2, ...] -> heads x pairs x 2 -> heads x 2 x pairs
    pairs = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def join_kv_b(keys: Tensor, values: Tensor) -> Tensor:
    """attn_k_b [heads, latent, nope] and attn_v_b [heads, v, latent] as kv_b_proj [heads * (nope
    + v), latent].
    """
    dtype = keys.dtype if keys.dtype == values.dtype else torch.float32
    joint = torch.cat([keys.to(dtype).transpose(1, 2), values.to(dtype)], dim=1)
    return joint.flatten(0, 1)
