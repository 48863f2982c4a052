"""Key mapping between Hugging Face tensor names (model.layers.N.self_attn.kv_b_proj.weight) and
model parameters: names, MTP layers, strict checks.

`mapping_operations` holds the operations chosen here; `check_tensors` makes every missing,
left-over or misshapen tensor an error.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowlat.checkpoint.mapping_operations import (
    Operation,
    PadLatent,
    Rename,
    Shapes,
    StackExperts,
    parameter_names,
)
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.hf.families import LOWLAT
from lowlat.config.model import MLAConfig, ModelConfig, QuantConfig
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

SCALE_SUFFIX = "_scale_inv"
PACKED_SUFFIXES = (".weight_scale", ".weight_minimum")
ROUTER_BIAS = ".e_score_correction_bias"
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POWERS_OF_TWO = torch.float8_e8m0fnu
"""Dtype of scales with scale_fmt ue8m0."""
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (*PLAIN_DTYPES, torch.float8_e4m3fn)
PACKED_DTYPES = (torch.uint8, torch.int8)
"""Dtypes of packed weights; their scales and all other tensors are plain floats."""

_log = logging.getLogger(__name__)


def operations(
    config: ModelConfig,
    parameters: Iterable[str],
    *,
    stored: ModelConfig | None = None,
    source: TensorSource | None = None,
) -> list[Operation]:
    """The operations that cover every one of `parameters` (names in the state dict) once.

    stored: config of the file, if `config` is that of its dequantized weights: the file pads no
    latents if its weights are packed. source: the file to load, which may store a layer's experts
    as two tensors or one by one; without it, the layout to save.
    """
    file = stored or config
    converted = _padded_attention(config) if file.packing is None else None
    padded = [] if converted is None else parameter_names(converted)
    # packed files have a separate head
    reads_embedding = config.tie_word_embeddings and config.packing is None
    stacks = _stacked_experts(file, source)
    known = dict.fromkeys(parameters)
    result: list[Operation] = []
    for parameter in known:
        prefix, found, below = parameter.rpartition("self_attn.")
        if converted is not None and below == "kv_a_proj_with_mqa.weight":
            prefix += found
            _refuse_blocks(prefix, known)
            result.append(PadLatent(file_name(config, prefix), prefix, converted))
        elif found and below in padded:
            continue
        elif parameter.startswith(stacks):
            continue
        elif parameter == "lm_head.weight" and reads_embedding:
            result.append(Rename(file_name(config, "embed_tokens.weight"), parameter))
        else:
            result.append(Rename(file_name(config, parameter), parameter))
    if stacks and config.moe is not None:
        count = config.moe.n_routed_experts
        result += [StackExperts(file_name(config, prefix), prefix, count) for prefix in stacks]
    return result


def _stacked_experts(config: ModelConfig, source: TensorSource | None) -> tuple[str, ...]:
    """Prefixes of layers ('layers.3.mlp.experts.') whose experts are two tensors of the file.
    Quantized weights have tensors of their own for each expert.
    """
    is_plain = config.packing is None and config.quantization is None
    if not is_plain or config.model_type != "mistral4" or config.moe is None:
        return ()
    layers = [n for n in range(config.num_hidden_layers) if config.is_moe_layer(n)]
    prefixes = [f"layers.{layer}.mlp.experts." for layer in layers]
    if source is not None:
        first = {prefix: f"{file_name(config, prefix)}0.down_proj.weight" for prefix in prefixes}
        prefixes = [prefix for prefix in prefixes if first[prefix] not in source.tensors]
    return tuple(prefixes)


def file_name(config: ModelConfig, parameter: str) -> str:
    """The Hugging Face name of a parameter (or of a prefix ending in a dot)."""
    if parameter.startswith("lm_head."):
        return parameter
    # in files the norm on the output of experts belongs to the layer
    parameter = parameter.replace(".mlp.post_mlp_layernorm.", ".post_mlp_layernorm.")
    if not parameter.startswith("mtp."):
        return f"model.{parameter}"
    _, depth, rest = parameter.split(".", 2)
    if rest.startswith(("norm.", "head.")):
        rest = f"shared_head.{rest}"
    return mtp_prefix(config, int(depth)) + rest.removeprefix("block.")


def mtp_prefix(config: ModelConfig, depth: int) -> str:
    """Prefix of MTP module `depth` in files: a layer after the last."""
    return f"model.layers.{config.num_hidden_layers + depth}."


def resolve_mtp_modules(config: ModelConfig, source: TensorSource) -> ModelConfig:
    """`config` with the MTP modules that the file contains.

    Programs without MTP save `num_nextn_predict_layers` but not its tensors: then a warning is
    logged and the model has no MTP modules. `mtp_copies` becomes true if they have their own
    embedding and head; one without the other is an error.
    """
    names = set(source.names())
    config = _resolve_router_bias(config, names)
    prefixes = [mtp_prefix(config, depth) for depth in range(config.num_nextn_predict_layers)]
    if not any(name.startswith(tuple(prefixes)) for name in names):
        if prefixes:
            _log.warning(
                "%s: no tensors of the %d MTP modules; loaded without", source.path, len(prefixes)
            )
        return replace(config, num_nextn_predict_layers=0, mtp_copies=False)
    copies = [
        f"{prefix}{name}"
        for prefix in prefixes
        for name in ("embed_tokens.weight", "shared_head.head.weight")
    ]
    absent = [name for name in copies if name not in names]
    if absent and len(absent) < len(copies):
        raise UserError(
            f"{source.path}: tensor {quoted(absent[0])} is missing; MTP modules must have both "
            "embedding and head, or neither"
        )
    return replace(config, mtp_copies=not absent)


def _resolve_router_bias(config: ModelConfig, names: set[str]) -> ModelConfig:
    """`config` without selection biases if it is axk1, which has been released without, and the
    file has none.
    """
    moe = config.moe
    if config.model_type != "axk1" or moe is None:
        return config
    has_bias = any(name.endswith(ROUTER_BIAS) for name in names)
    return replace(config, moe=replace(moe, router_bias=has_bias))


def mtp_copies(config: ModelConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The MTP modules' copies of embedding and head, by parameter, as the main model has them."""
    embedding = parameters["embed_tokens.weight"]
    head = parameters.get("lm_head.weight", embedding)
    return {
        f"mtp.{depth}.{name}.weight": matrix
        for depth in range(config.num_nextn_predict_layers)
        for name, matrix in (("embed_tokens", embedding), ("head", head))
    }


def check_tensors(
    config: ModelConfig, source: TensorSource, plan: Iterable[Operation], shapes: Shapes
) -> None:
    """Raise UserError unless `source` has exactly the tensors of `plan`, in the shapes that
    parameters of `shapes` need.

    Two leftovers are accepted: rotary frequencies of old llama files, which config determines, and
    the head of a tied model, which must equal the embedding bit for bit.
    """
    expected = {file: shape for step in plan for file, shape in step.file_shapes(shapes).items()}
    names = source.names()
    missing = [name for name in expected if name not in source.tensors]
    if missing:
        raise UserError(
            f"{source.path}: tensor {quoted(missing[0])}{_more(missing)} is missing; the "
            "checkpoint is incomplete"
        )
    extra = [
        name for name in names if name not in expected and not name.endswith("rotary_emb.inv_freq")
    ]
    if config.moe is not None and config.moe.output_norm:
        # released files have the norm in dense layers, too, where nothing computes with it
        extra = [name for name in extra if not name.endswith(".post_mlp_layernorm.weight")]
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        _check_tied(source)
        extra.remove("lm_head.weight")
    if extra:
        raise UserError(
            f"{source.where(extra[0])}{_more(extra)} has no place in the model; "
            f"{_hint(config, extra[0])}; take config.json and weights from one model"
        )
    for name, shape in expected.items():
        _check_type(config, source, name)
        if source.shape(name) != shape:
            raise UserError(
                f"{source.where(name)} has shape {list(source.shape(name))}, but the config asks "
                f"for {list(shape)}"
            )


def _check_type(config: ModelConfig, source: TensorSource, name: str) -> None:
    """Raise UserError for a dtype that the tensor has in no checkpoint of this config."""
    dtype = source.dtype(name)
    if config.quantization is not None and name.endswith(SCALE_SUFFIX):
        check_scale_type(config.quantization, source, name)
    elif dtype == torch.float8_e4m3fn and config.quantization is None:
        raise UserError(
            f"{source.where(name)} is fp8 (F8_E4M3), but config.json has no quantization_config "
            "that defines its scales; take config.json and all weights from the "
            "original model"
        )
    elif dtype not in WEIGHT_DTYPES + PACKED_DTYPES * (config.packing is not None):
        shown = str(dtype).removeprefix("torch.")
        raise UserError(f"{source.where(name)} is {shown}, which no weight can be")


def check_scale_type(quant: QuantConfig, source: TensorSource, name: str) -> None:
    """Raise UserError unless the tensor `name` has a dtype of fp8 block scales."""
    dtype = source.dtype(name)
    if dtype in SCALE_DTYPES or (dtype == POWERS_OF_TWO and quant.scale_fmt == "ue8m0"):
        return
    shown = str(dtype).removeprefix("torch.")
    also = ", or float8_e8m0fnu with scale_fmt ue8m0" if dtype == POWERS_OF_TWO else ""
    raise UserError(
        f"{source.where(name)} is {shown}, but scales are float32, bfloat16 or float16{also}; "
        "get the original checkpoint again"
    )


def check_scale_values(scale: torch.Tensor, where: str) -> None:
    """Raise UserError starting with `where` unless all of `scale` is finite and not negative."""
    values = scale.to(torch.float32)
    if not bool(values.isfinite().all()):
        raise UserError(f"{where} holds values that are not finite; the checkpoint is damaged")
    if bool((values < 0).any()):
        raise UserError(f"{where} holds scales below 0; the checkpoint is damaged")


def _padded_attention(config: ModelConfig) -> MLAConfig | None:
    """The attention of an exactly converted model with padded latents, else None."""
    attention = config.attention
    if not isinstance(attention, MLAConfig) or attention.kv_a_layernorm:
        return None
    return None if config.model_type == LOWLAT else attention


def _refuse_blocks(prefix: str, parameters: Mapping[str, object]) -> None:
    names = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    if any(f"{prefix}{name}.weight{SCALE_SUFFIX}" in parameters for name in names):
        raise UserError(
            "quantization_config: fp8 blocks in the attention of an exactly converted model are "
            "not supported; list its self_attn in modules_to_not_convert, or convert it to bf16"
        )


def _check_tied(source: TensorSource) -> None:
    head, embedding = source.read("lm_head.weight"), source.read("model.embed_tokens.weight")
    if (
        head.dtype != embedding.dtype
        or head.shape != embedding.shape
        # bitwise, NaNs included, without a copy
        or not torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (head, embedding)))
    ):
        raise UserError(
            f"{source.where('lm_head.weight')} differs from the embedding although the config sets "
            "tie_word_embeddings; set that to false or remove the tensor"
        )
    source.release("lm_head.weight")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _hint(config: ModelConfig, name: str) -> str:
    if name.endswith(SCALE_SUFFIX):
        return "the config has no quantization_config that puts fp8 blocks there"
    if name.endswith(PACKED_SUFFIXES):
        return "the config has no quantization_config that marks the weights as packed"
    return (
        f"the config has num_hidden_layers {config.num_hidden_layers}, num_nextn_predict_layers "
        f"{config.num_nextn_predict_layers}, model_type {config.model_type}"
    )
