"""The `quantization_config` of config.json <-> storage fields of ModelConfig, by quant_method.

METHODS has an entry for each quant_method; compressed-tensors, AWQ, GPTQ and the like are in
`vendor_quantization`. fp8 are blocks as DeepSeek releases them. lowlat marks projections packed in
int8 or int4 tiles:

    {"quant_method": "lowlat", "bits": 4, "group_size": 32, "tile_rows": 16}

bits: 8 or 4; which projections are stored how follows from it (`model.quant`). group_size: columns
that share a scale; tile_rows: rows of a tile (`ops.quantized`). Files hold the bytes that the
kernels read; another byte order would have other values here. Tensors have the names and shapes of
lowlat's parameters, also in exactly converted models, whose latent is not padded.
"""

from collections.abc import Callable
from typing import Any

from lowlat.config.hf.vendor_quantization import VENDORS, is_vendors, vendor_quantization
from lowlat.config.model import ModelConfig, Packing, QuantConfig
from lowlat.utils.json_fields import JsonFields

FP8, PACKED = "fp8", "lowlat"
"""Values of quant_method."""
BITS: dict[Packing, int] = {"int8": 8, "int4": 4}
GROUP_SIZE = 32
TILE_ROWS = 16


def storage_from_hf(fields: JsonFields, methods: tuple[str, ...] = ()) -> dict[str, Any]:
    """Storage fields of ModelConfig; empty without quantization_config. Raises UserError naming a
    wrong or unknown field, and for other methods than `methods`, by default all.
    """
    table = fields.table("quantization_config")
    if table is None:
        return {}
    method = table.choice("quant_method", methods or tuple({**METHODS, **dict.fromkeys(VENDORS)}))
    if not methods and is_vendors(table):
        vendor_quantization(table)
        return {}
    return METHODS[method](table)


def storage_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The reverse of the above: the field quantization_config, if the model has one."""
    if config.packing is not None:
        return {"quantization_config": packing_to_hf(config.packing)}
    if config.quantization is not None:
        return {"quantization_config": _blocks_to_hf(config.quantization)}
    return {}


def packing_to_hf(packing: Packing) -> dict[str, Any]:
    """The quantization_config of packed projections."""
    return {
        "quant_method": PACKED,
        "bits": BITS[packing],
        "group_size": GROUP_SIZE,
        "tile_rows": TILE_ROWS,
    }


def _packing(table: JsonFields) -> dict[str, Any]:
    bits = table.integer("bits")
    if bits not in BITS.values():
        raise table.unsupported("bits", "supported: 8, 4")
    for name, supported in (("group_size", GROUP_SIZE), ("tile_rows", TILE_ROWS)):
        if table.integer(name) != supported:
            raise table.unsupported(name, f"supported: {supported}")
    table.reject_unread("is unknown; was it written by a newer lowlat?", allow_empty=False)
    return {"packing": next(name for name, own in BITS.items() if own == bits)}


def _blocks(table: JsonFields) -> dict[str, Any]:
    table.choice("fmt", ("e4m3",), "e4m3")
    table.choice("activation_scheme", ("dynamic",), "dynamic")
    block = table.items("weight_block_size")
    if len(block) != 2 or any(type(size) is not int or not 0 < size <= 2**16 for size in block):
        raise table.wrong("weight_block_size", "two sizes such as [128, 128]")
    table.choice("expert_dtype", ("fp8",), "fp8")
    if table.boolean("dequantize", False):
        raise table.unsupported("dequantize", "set it to false, and choose with --dtype")
    scale_fmt = table.choice("scale_fmt", ("float", "ue8m0"), "float")
    quant = QuantConfig(
        weight_block_size=(block[0], block[1]),
        scale_fmt=None if scale_fmt == "float" else scale_fmt,
        modules_to_not_convert=table.strings("modules_to_not_convert"),
    )
    table.reject_unread("is unknown and may change the weights; remove it if it does not")
    return {"quantization": quant}


def _blocks_to_hf(quant: QuantConfig) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "quant_method": FP8,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(quant.weight_block_size),
    }
    if quant.scale_fmt is not None:
        raw["scale_fmt"] = quant.scale_fmt
    if quant.modules_to_not_convert:
        raw["modules_to_not_convert"] = list(quant.modules_to_not_convert)
    return raw


METHODS: dict[str, Callable[[JsonFields], dict[str, Any]]] = {FP8: _blocks, PACKED: _packing}
"""Parsers by quant_method."""
