"""DeepSeek's inference/model.py as a peer: import the user's copy, build the model, load weights.

Its `kernel` module needs a GPU and is replaced by a stub that raises an error: weights are
dequantized on load, so no fp8 kernel runs.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.utils.errors import UserError

RENAMED = {
    "embed_tokens": "embed",
    "self_attn": "attn",
    "mlp": "ffn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lm_head": "head",
    "e_score_correction_bias": "bias",
}
"""Parts of Hugging Face parameter names -> those of model.py."""
CLASSES = ("ModelArgs", "Transformer", "MLA", "Gate")
FUNCTIONS = ("apply_rotary_emb",)


def import_script(path: Path) -> Any:
    """Import the user's file as a module. Raises UserError if it lacks the public classes."""
    kernel = ModuleType("kernel")

    def refuse(*_: object) -> Tensor:
        raise UserError("model.py called an fp8 kernel; weights are bf16 here")

    for name in ("act_quant", "weight_dequant", "fp8_gemm"):
        setattr(kernel, name, refuse)
    sys.modules["kernel"] = kernel
    spec = importlib.util.spec_from_file_location("deepseek_model_py", path)
    if spec is None or spec.loader is None:
        raise UserError(f"'{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["deepseek_model_py"] = module  # dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    # Any exception, even SystemExit, is an error in the user's file.
    except (Exception, SystemExit) as error:
        raise UserError(f"'{path}' cannot be imported: {type(error).__name__}: {error}") from error
    absent = [name for name in (*CLASSES, *FUNCTIONS) if not hasattr(module, name)]
    if absent:
        raise UserError(
            f"'{path}' has no {', '.join(absent)}; is it DeepSeek's inference/model.py?"
        )
    return module


def model_args(module: Any, config: ModelConfig, length: int) -> Any:
    """ModelArgs for `config`. model.py applies YaRN if max_seq_len exceeds original_seq_len."""
    attention, rope, moe = config.attention, config.rope, config.moe
    if not isinstance(attention, MLAConfig) or isinstance(rope, tuple):
        raise UserError("model.py supports MLA only, with the same sizes and RoPE in all layers")
    is_yarn = rope.rope_type == "yarn"
    if rope.rope_type not in ("default", "yarn"):
        raise UserError(f"model.py does not support rope_type '{rope.rope_type}'")
    original = rope.original_max_position_embeddings if is_yarn else length
    assert original is not None
    fields: dict[str, Any] = {
        "max_batch_size": 1,
        "max_seq_len": max(length, original + 1) if is_yarn else length,
        "dtype": "bf16",
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "inter_dim": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_dense_layers": config.num_hidden_layers,
        "n_heads": attention.num_attention_heads,
        "q_lora_rank": attention.q_lora_rank or 0,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "original_seq_len": original,
        "rope_theta": rope.rope_theta,
        "rope_factor": rope.factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale_all_dim or 0.0,
    }
    if moe is not None:
        fields |= {
            "moe_inter_dim": moe.moe_intermediate_size,
            "n_dense_layers": moe.first_k_dense_replace,
            "n_routed_experts": moe.n_routed_experts,
            "n_shared_experts": moe.n_shared_experts,
            "n_activated_experts": moe.num_experts_per_tok,
            "n_expert_groups": moe.n_group,
            "n_limited_groups": moe.topk_group,
            "score_func": moe.scoring_func,
            "route_scale": moe.routed_scaling_factor,
        }
    try:
        return module.ModelArgs(**fields)
    except TypeError as error:
        raise UserError(f"its ModelArgs is not the public one: {error}") from error


def deepseek_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> layers.0.attn.wq.weight"""
    parts = name.removeprefix("model.").split(".")
    return ".".join(RENAMED.get(part, part) for part in parts)


def load_weights(model: Any, source: TensorSource, config: ModelConfig) -> None:
    """Copy the weights into the model. Raises UserError naming a missing one."""
    end = config.num_hidden_layers
    filled: set[str] = set()
    for name in source.names():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"] and int(parts[2]) >= end:
            continue  # MTP modules
        target = deepseek_name(name)
        _fill(model, target, source.read(name))
        filled.add(target)
    if config.tie_word_embeddings:
        model.head.weight.data.copy_(model.embed.weight.data)
        filled.add("head.weight")
    # A model without shared experts still has their parameters, of width 0.
    empty = {name for name, value in model.named_parameters() if not value.numel()}
    missing = [name for name, _ in model.named_parameters() if name not in filled | empty]
    if missing:
        raise UserError(f"{source.path} has no weight for {missing[0]} of model.py")


def _fill(model: Any, target: str, value: Tensor) -> None:
    owner, _, leaf = target.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError as error:
        raise UserError(f"model.py has no module for {target}") from error
    parameter = getattr(module, leaf, None)
    if leaf == "bias" and parameter is None:
        # Linear layers of model.py have no bias. Its gate has one only if dim is 7168: in fp32, or
        # before August 2025 in the dtype of the activations, which is preserved.
        bias = value.float() if owner.endswith("gate") else value.to(module.weight.dtype)
        module.bias = torch.nn.Parameter(bias, requires_grad=False)
        return
    if parameter is None or parameter.shape != value.shape:
        raise UserError(f"model.py has no {target} of shape {list(value.shape)}")
    parameter.data.copy_(value)


def build(module: Any, config: ModelConfig, length: int, dtype: torch.dtype) -> Any:
    """The model for `length` positions in `dtype`, with uninitialized weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = module.Transformer(model_args(module, config, length))
    finally:
        torch.set_default_dtype(before)
    # model.py creates Linear layers in bf16, regardless of the default dtype; fp32 tensors stay.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.to(dtype)
    for name, part in model.named_modules():
        if name.rpartition(".")[2] in ("attn_norm", "ffn_norm", "norm") and hasattr(part, "eps"):
            part.eps = config.rms_norm_eps  # ModelArgs has no field for it
    return model
