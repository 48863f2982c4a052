"""TensorSource of folders quantized by compressed-tensors, AWQ, GPTQ, fbgemm or MXFP4: plain
weights, each with the storage type that keeps its values exactly.

Blocks of fp8 in compressed-tensors files become those of DeepSeek's, whose storage they share.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lowlat.checkpoint.tensor_source import StoredTensor, TensorSource
from lowlat.checkpoint.vendors.float_weights import fp8_rows, mxfp4_blocks, packed_mxfp4
from lowlat.checkpoint.vendors.int4 import int4_weight
from lowlat.checkpoint.vendors.parts import VendorWeight
from lowlat.config.hf.vendor_quantization import (
    Layout,
    Scheme,
    VendorQuantization,
    is_vendors,
    vendor_quantization,
)
from lowlat.utils.errors import UserError
from lowlat.utils.json_fields import JsonFields

FIELD = "quantization_config"
ACTIVATION_SCALES = ("activation_scale", "input_scale")
WEIGHT, SCALE, BLOCK_SCALE = ".weight", ".weight_scale", ".weight_scale_inv"

_log = logging.getLogger(__name__)


def vendor_source(source: TensorSource) -> TensorSource:
    """`source`; if another program quantized it, its weights by name, and its config without
    quantization_config. Raises UserError naming a field or tensor that is not supported.
    """
    file = str(source.path / "config.json")
    table = JsonFields(source.hf_config, file).table(FIELD)
    if table is None or not is_vendors(table):
        return source
    quant = vendor_quantization(table, file)
    config = {name: value for name, value in source.hf_config.items() if name != FIELD}
    if any(scheme.layout == "fp8 blocks" for _, scheme in quant.groups):
        return _fp8_blocks(source, quant, config)
    tensors: dict[str, StoredTensor] = dict(source.tensors)
    for name in source.tensors:
        found = _found(source, name, quant)
        for weight in found.values():
            for part in weight.parts:
                tensors.pop(part, None)
        tensors |= found
    unused = [name for name in tensors if name.endswith(ACTIVATION_SCALES)]
    for name in unused:
        del tensors[name]
    if unused:
        _log.warning("%s: activations stay bf16; their stored fp8 scales are unused", source.path)
    return replace(source, hf_config=config, tensors=tensors)


def _found(
    source: TensorSource, name: str, quant: VendorQuantization
) -> Mapping[str, VendorWeight]:
    """The quantized weights whose values are in tensor `name`; none for other tensors."""
    module, _, part = name.rpartition(".")
    if part == "weight" and source.dtype(name) == torch.float8_e4m3fn:
        _scheme(source, name, quant, "fp8 rows")
        scales = (module + SCALE, module + BLOCK_SCALE)
        scale = next((each for each in scales if each in source.tensors), scales[0])
        return {name: fp8_rows(source, module, scale)}
    if part == "weight_packed":
        scheme = _scheme(source, name, quant, "pack-quantized", "mxfp4")
        _refuse_order(source, f"{module}.weight_g_idx")
        is_float = scheme.layout == "mxfp4"
        weight = packed_mxfp4(source, module) if is_float else int4_weight(source, module, scheme)
        return {module + WEIGHT: weight}
    if part == "qweight":
        scheme = _scheme(source, name, quant, "awq", "gptq", "gptq_v2")
        return {module + WEIGHT: int4_weight(source, module, scheme)}
    if part.endswith("_blocks"):
        _scheme(source, name, quant, "mxfp4 blocks")
        return dict(mxfp4_blocks(source, name))
    return {}


def _scheme(source: TensorSource, name: str, quant: VendorQuantization, *layouts: Layout) -> Scheme:
    """The scheme of a tensor's module. Raises UserError unless it has one of `layouts`."""
    scheme = quant.scheme_of(name.rpartition(".")[0])
    if scheme.layout not in layouts:
        raise UserError(
            f"{source.where(name)} is stored as {layouts[0]}, but quantization_config describes "
            f"{scheme.layout}; take config.json and weights from one model"
        )
    return scheme


def _refuse_order(source: TensorSource, name: str) -> None:
    if name in source.tensors:
        raise UserError(
            f"{source.where(name)}: columns in activation order (act-order) are not supported; "
            "quantize the model without it"
        )


def _fp8_blocks(
    source: TensorSource, quant: VendorQuantization, config: dict[str, Any]
) -> TensorSource:
    """The same tensors and config as in a file of DeepSeek's."""
    schemes = [scheme for _, scheme in quant.groups]
    block = schemes[0].block
    if block is None or any(scheme != schemes[0] for scheme in schemes):
        raise UserError(
            f"{quant.source}: {FIELD}.config_groups: fp8 blocks next to other formats are not "
            "supported; use one format for all modules"
        )
    plain: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for name, stored in source.tensors.items():
        module = name.removesuffix(WEIGHT)
        if name.endswith(WEIGHT) and stored.dtype != torch.float8_e4m3fn:
            plain.append(module)
        elif name.endswith(WEIGHT):
            quant.scheme_of(module)
        is_scale = name.endswith(SCALE)
        tensors[name.removesuffix(SCALE) + BLOCK_SCALE if is_scale else name] = stored
    config[FIELD] = {
        "quant_method": "fp8",
        "weight_block_size": list(block),
        "modules_to_not_convert": plain,
    }
    return replace(source, hf_config=config, tensors=tensors)
