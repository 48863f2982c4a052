"""Folders with weights as other programs quantize them, and the exact weights that they hold.

compressed-tensors writes its own formats, and dequantizes them and AWQ's; GPTQ's and gpt-oss's are
written and dequantized here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowlat.config.model import ModelConfig

from .builders import write_model

Parts = dict[str, Tensor]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of a word's nibble."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a program stores one weight, and the quantization_config that it writes."""

    config: dict[str, Any]
    write: Callable[[Tensor], tuple[Parts, Tensor]]
    """The tensors by their names below the module, and the exact weight in fp32."""
    field: str = field(default="weight")


def quantize_folder(
    folder: Path, model: ModelConfig, own: Format, *, seed: int = 0
) -> dict[str, Tensor]:
    """Write a random model whose projections are quantized, all but router and head. Returns the
    exact weights by name.
    """
    torch.manual_seed(seed)
    write_model(folder, model)
    path = folder / "model.safetensors"
    tensors, exact = load_file(path), dict[str, Tensor]()
    for name, value in list(tensors.items()):
        is_projection = value.dim() == 2 and name.endswith("_proj.weight")
        exact[name] = value.float()
        if is_projection or name.endswith("kv_a_proj_with_mqa.weight"):
            parts, exact[name] = own.write(value.float() * value.shape[1] ** -0.5)
            del tensors[name]
            tensors |= {name.removesuffix("weight") + part: one for part, one in parts.items()}
    save_file(tensors, path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": own.config}))
    return exact


# --- compressed-tensors -------------------------------------------------------------------------


def compressed(
    compressor: Any, name: str, scale: torch.dtype = torch.bfloat16, **weights: Any
) -> Format:
    """A format of compressed-tensors."""
    raw = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}}
    scheme = QuantizationScheme.model_validate(raw)
    config = {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json") | {"format": name}},
        "ignore": ["lm_head", r"re:.*mlp\.gate$"],
        "kv_cache_scheme": None,
        "version": "0.20.1",
    }

    def write(weight: Tensor) -> tuple[Parts, Tensor]:
        state = {"weight": weight.to(scale)} | _scales(weight, scheme, scale)
        parts = compressor.compress(state, scheme)
        wide = {key: one.float() if one.dtype == scale else one for key, one in parts.items()}
        exact = compressor.decompress(wide, scheme)["weight"].float()
        return {key: one.contiguous() for key, one in parts.items()}, exact

    return Format(config, write)


def _scales(weight: Tensor, scheme: QuantizationScheme, dtype: torch.dtype) -> Parts:
    args = scheme.weights
    assert args is not None
    columns = weight.shape[1]
    if args.strategy == "tensor":
        groups = weight.reshape(1, 1, -1)
    elif args.strategy == "block":
        return {"weight_scale": _block_scales(weight, args.block_structure, dtype)}
    else:
        size = args.group_size if args.strategy == "group" else columns
        assert size is not None
        groups = weight.unflatten(1, (-1, size))
    most = groups.abs().amax(dim=2)
    if args.type == "float" and args.num_bits == 4:
        return {"weight_scale": torch.exp2(torch.floor(torch.log2(most)) - 2).to(dtype)}
    if args.type == "float":
        scale = (most / 448).to(dtype)
        return {"weight_scale": scale.reshape(1) if args.strategy == "tensor" else scale}
    if args.symmetric:
        return {"weight_scale": (most / 7.5).to(dtype)}
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    scale = ((high - low) / 15).to(dtype)
    zero = (-8 - low / scale.float()).round().clamp(-8, 7).to(torch.int8)
    return {"weight_scale": scale, "weight_zero_point": zero}


def _block_scales(weight: Tensor, block: Any, dtype: torch.dtype) -> Tensor:
    rows, columns = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
    scale = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            part = weight[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            scale[r, c] = part.abs().max() / 448
    return scale.to(dtype)


def int4(
    group: int | None = 32, *, symmetric: bool = True, scale: torch.dtype = torch.bfloat16
) -> Format:
    """pack-quantized int4; group None: per channel."""
    own = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    fields = {"num_bits": 4, "type": "int", "symmetric": symmetric, **own}
    return compressed(PackedQuantizationCompressor, "pack-quantized", scale, **fields)


def float8(strategy: str, **more: Any) -> Format:
    fields = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}
    return compressed(FloatQuantizationCompressor, "float-quantized", **fields)


def mxfp4() -> Format:
    fields = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group"}
    more = {"group_size": 32, "scale_dtype": "torch.uint8"}
    return compressed(MXFP4PackedCompressor, "mxfp4-pack-quantized", **fields, **more)


# --- AWQ, GPTQ, fbgemm, gpt-oss ------------------------------------------------------------------


def affine(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], zero points 0 to 15 and fp16 scales [out, groups] of min-max int4."""
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(0, 14)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    return codes.flatten(1).int(), zero.int(), scale


def dequantized(codes: Tensor, zero: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """scale (code - zero), by the group of every column."""
    return (codes - zero[:, index]).float() * scale.float()[:, index]


def pack(numbers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Each 8 numbers along the last axis as an int32; nibble i is number order[i]."""
    eights = numbers.long().unflatten(-1, (-1, 8))
    words = sum(eights[..., column] << 4 * nibble for nibble, column in enumerate(order))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def awq(group: int = 128) -> Format:
    def write(weight: Tensor) -> tuple[Parts, Tensor]:
        codes, zero, scale = affine(weight, group)
        parts = {
            "qweight": pack(codes.t(), AWQ_COLUMNS),
            "qzeros": pack(zero.t(), AWQ_COLUMNS),
            "scales": scale.t().contiguous(),
        }
        exact = awq_oracle(parts, group)
        assert torch.equal(
            exact, dequantized(codes, zero, scale, torch.arange(weight.shape[1]) // group)
        )
        return parts, exact

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    return Format(config, write)


def awq_oracle(parts: Parts, group: int) -> Tensor:
    """The weight as compressed-tensors reads AWQ's: converted to its own format, dequantized."""
    converter = AutoAWQConverter(group_size=group)
    moved = converter.process({f"m.{name}": part.clone() for name, part in parts.items()})
    state = {name.removeprefix("m."): part for name, part in moved.items()}
    state["weight_scale"] = state["weight_scale"].float()
    fields = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    weights = {"dynamic": False, "group_size": group, **fields}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    return PackedQuantizationCompressor.decompress(state, scheme)["weight"].float()


def gptq(group: int = 128, *, version: int = 1, act_order: bool = False) -> Format:
    def write(weight: Tensor) -> tuple[Parts, Tensor]:
        order = torch.arange(weight.shape[1])
        if act_order:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
        inverse = order.argsort()
        codes, zero, scale = affine(weight[:, order], group)
        less = int(version == 1)
        zero += less  # stored 0 is zero point 1
        codes, index = codes[:, inverse], inverse // group
        parts = {
            "qweight": pack(codes).t().contiguous(),
            "qzeros": pack((zero - less).t()),
            "scales": scale.t().contiguous(),
            "g_idx": index.int(),
        }
        return parts, dequantized(codes, zero, scale, index)

    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": act_order,
        "sym": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "damp_percent": 0.01,
        "true_sequential": True,
    }
    return Format(config, write)


def fbgemm() -> Format:
    def write(weight: Tensor) -> tuple[Parts, Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        values = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": scale}, values.float() * scale

    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    return Format(config | {"modules_to_not_convert": ["lm_head"]}, write)


def float8_tensor() -> Format:
    """quant_method fp8 with a scale per matrix."""

    def write(weight: Tensor) -> tuple[Parts, Tensor]:
        scale = weight.abs().max() / 448
        values = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": scale}, values.float() * scale

    return Format({"quant_method": "fp8", "activation_scheme": "dynamic"}, write)


def e2m1(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MXFP4: blocks [..., columns / 32, 16], exponents [..., columns / 32], exact weights."""
    groups = weight.unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(dim=-1))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    nearest = (scaled.abs()[..., None] - E2M1).abs().argmin(dim=-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    exact = E2M1[nearest] * torch.where(scaled < 0, -1, 1) * torch.exp2(exponent)[..., None]
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return blocks, (exponent + 127).to(torch.uint8), exact.flatten(-2)


def mxfp4_blocks() -> Format:
    """gpt-oss's names for single matrices."""

    def write(weight: Tensor) -> tuple[Parts, Tensor]:
        blocks, scales, exact = e2m1(weight)
        return {"weight_blocks": blocks, "weight_scales": scales}, exact

    return Format({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, write)


FORMATS: dict[str, Format] = {
    "int4": int4(),
    "int4-fp16": int4(scale=torch.float16),
    "int4-64": int4(64),
    "int4-asymmetric": int4(symmetric=False),
    "int4-channel": int4(None),
    "int4-128": int4(128, symmetric=False),
    "awq": awq(),
    "awq-32": awq(32),
    "gptq": gptq(),
    "gptq-32": gptq(32),
    "gptq-v2": gptq(version=2),
    "fp8-channel": float8("channel"),
    "fp8-tensor": float8("tensor"),
    "fbgemm": fbgemm(),
    "fp8": float8_tensor(),
    "mxfp4": mxfp4(),
    "mxfp4-blocks": mxfp4_blocks(),
}
