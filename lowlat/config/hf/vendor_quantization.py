"""The `quantization_config` of compressed-tensors, AWQ, GPTQ, fbgemm and MXFP4 files -> how each
module's weight is stored.

Which modules are quantized follows from their tensors, so the lists of modules that are not
(`modules_to_not_convert`) are not needed; compressed-tensors' `ignore` must agree with the tensors.
Weights alone are quantized: activations that a file would quantize while it runs stay bf16. Every
other field that changes weights or the computation is understood or an error.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from lowlat.utils.errors import UserError
from lowlat.utils.json_fields import JsonFields

Layout = Literal[
    "pack-quantized", "awq", "gptq", "gptq_v2", "fp8 rows", "fp8 blocks", "mxfp4", "mxfp4 blocks"
]
"""Names, shapes and byte orders of a weight's tensors (`checkpoint.vendors`)."""

COMPRESSED_TENSORS = "compressed-tensors"
PREFIXES = ("", "language_model.", "model.language_model.")
"""What modules of multimodal models have before the names of their language part."""
GROUP_STEP = 32
"""Group sizes are multiples of this, the columns of the smallest block."""
_UNKNOWN = "is unknown and may change the weights; remove it if it does not"
_GPTQ_HARMLESS = (
    "act_group_aware",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "exllama_config",
    "hyb_act",
    "is_marlin_format",
    "lm_head",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "modules_to_not_convert",
    "mse",
    "pad_token_id",
    "static_groups",
    "sym",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
)
"""How the weights were found, or which kernels multiply them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How weights are stored."""

    layout: Layout
    group_size: int | None = None
    """Columns that share a scale, of int4; None: the whole row."""
    has_zeros: bool = False
    """Whether int4 weights have zero points."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, of fp8 blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VendorQuantization:
    """A parsed quantization_config."""

    method: str
    source: str
    """The file, for errors."""
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    """Targets and their scheme."""
    ignore: tuple[str, ...] = ()

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of a module whose tensors are quantized. Raises UserError if it has none."""
        names = [prefix + module for prefix in PREFIXES]
        if any(_matches(pattern, name) for pattern in self.ignore for name in names):
            raise self._error(f"ignore names {module}, but its weight is quantized")
        for targets, scheme in self.groups:
            exact = any(_matches(target, name) for target in targets for name in names)
            if exact or "Linear" in targets:
                return scheme
        raise self._error(f"config_groups: no target matches {module}, whose weight is quantized")

    def _error(self, problem: str) -> UserError:
        return UserError(
            f"{self.source}: quantization_config.{problem}; take config.json and weights from one "
            "model"
        )


def vendor_quantization(table: JsonFields, source: str = "config.json") -> VendorQuantization:
    """Parse the quantization_config of a method in VENDORS; `source` is the file, for errors.

    Raises UserError naming a field that is wrong, unknown or not supported.
    """
    method = table.choice("quant_method", VENDORS)
    if method == COMPRESSED_TENSORS:
        groups, ignore = _compressed_tensors(table)
    else:
        groups, ignore = ((("Linear",), _SCHEMES[method](table)),), ()
    table.reject_unread(_UNKNOWN)
    return VendorQuantization(method=method, source=source, groups=groups, ignore=ignore)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern == name


def _compressed_tensors(
    table: JsonFields,
) -> tuple[tuple[tuple[tuple[str, ...], Scheme], ...], tuple[str, ...]]:
    table.ignore("global_compression_ratio", "version")
    table.choice("quantization_status", ("compressed",), "compressed")
    for name in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if table.value(name) not in (None, {}):
            raise table.unsupported(name, "supported: null")
    sparsity = table.table("sparsity_config")
    if sparsity is not None:
        sparsity.choice("format", ("dense",), "dense")
    formats = (*FORMATS, "mixed-precision")
    common = table.choice("format", formats)
    ignore = table.strings("ignore")
    _check_patterns(table, "ignore", ignore)
    named = table.table("config_groups")
    names = table.value("config_groups")
    if named is None or not names:
        raise table.error("config_groups", "is missing; the weights are not determined without it")
    groups: list[tuple[tuple[str, ...], Scheme]] = []
    for name in names:
        group = named.table(name)
        if group is None:
            raise named.wrong(name, "an object")
        targets = group.strings("targets")
        _check_patterns(group, "targets", targets)
        group_format = group.choice("format", tuple(FORMATS), common)
        weights = group.table("weights")
        if weights is None:
            raise group.error("weights", "is missing; only quantized weights have a group")
        _activations(group)
        groups.append((targets, FORMATS[group_format](weights)))
        weights.reject_unread(_UNKNOWN)
        group.reject_unread(_UNKNOWN)
    return tuple(groups), ignore


def _check_patterns(table: JsonFields, name: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise table.error(name, f"has a malformed expression: {error}") from error


def _activations(group: JsonFields) -> None:
    if group.present("output_activations"):
        raise group.unsupported("output_activations", "supported: null")
    group.ignore("input_activations")  # activations stay bf16


def _weights(weights: JsonFields, kind: str, bits: int) -> str:
    """Checks what all formats share; returns the strategy."""
    weights.choice("type", (kind,))
    if weights.integer("num_bits") != bits:
        raise weights.unsupported("num_bits", f"supported: {bits}")
    if weights.value("dynamic") not in (None, False):
        raise weights.unsupported("dynamic", "supported: false")
    weights.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    default = "channel" if weights.value("group_size") in (None, -1) else "group"
    return weights.choice("strategy", ("group", "channel", "tensor", "block"), default)


def _symmetric(weights: JsonFields) -> None:
    if not weights.boolean("symmetric", True):
        raise weights.unsupported("symmetric", "supported: true")


def _int4(weights: JsonFields) -> Scheme:
    strategy = _weights(weights, "int", 4)
    if strategy not in ("group", "channel"):
        raise weights.unsupported("strategy", "supported: group, channel")
    if weights.value("actorder") not in (None, False, "weight", "static"):
        raise weights.unsupported("actorder", _ACT_ORDER)
    weights.ignore("block_structure")
    size = _group_size(weights, is_channel=strategy == "channel")
    has_zeros = not weights.boolean("symmetric", True)
    return Scheme(layout="pack-quantized", group_size=size, has_zeros=has_zeros)


def _float8(weights: JsonFields) -> Scheme:
    strategy = _weights(weights, "float", 8)
    _symmetric(weights)
    weights.ignore("actorder", "group_size")
    structure = weights.value("block_structure")
    if strategy == "group":
        raise weights.unsupported("strategy", "supported: channel, tensor, block")
    if strategy != "block":
        return Scheme(layout="fp8 rows")
    if not isinstance(structure, list) or len(structure) != 2:
        raise weights.wrong("block_structure", "two sizes such as [128, 128]")
    rows, columns = structure
    if any(type(size) is not int or not 0 < size <= 2**16 for size in structure):
        raise weights.wrong("block_structure", "two sizes such as [128, 128]")
    return Scheme(layout="fp8 blocks", block=(rows, columns))


def _mxfp4_packed(weights: JsonFields) -> Scheme:
    strategy = _weights(weights, "float", 4)
    _symmetric(weights)
    weights.ignore("actorder", "block_structure")
    if strategy != "group" or weights.integer("group_size") != 32:
        raise weights.unsupported("group_size", "supported: 32")
    return Scheme(layout="mxfp4")


FORMATS: Mapping[str, Callable[[JsonFields], Scheme]] = {
    "pack-quantized": _int4,
    "float-quantized": _float8,
    "naive-quantized": _float8,
    "mxfp4-pack-quantized": _mxfp4_packed,
}
"""Formats of compressed-tensors."""

_ACT_ORDER = (
    "columns in activation order (act-order, desc_act) are only dequantized; quantize the model "
    "without it"
)


def _group_size(table: JsonFields, *, is_channel: bool = False) -> int | None:
    size = table.value("group_size")
    if size in (None, -1):
        if size is None and not is_channel:
            raise table.error("group_size", "is missing; the weights are not determined without it")
        return None
    if is_channel:
        raise table.unsupported("group_size", "strategy channel has none (null)")
    table.integer("group_size")
    if size % GROUP_STEP:
        raise table.unsupported("group_size", f"supported: multiples of {GROUP_STEP}, -1")
    return size


def _four_bits(table: JsonFields) -> None:
    if table.integer("bits") != 4:
        raise table.unsupported("bits", "supported: 4")


def _awq(table: JsonFields) -> Scheme:
    table.ignore(*_GPTQ_HARMLESS, "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "desc_act")
    _four_bits(table)
    if not table.boolean("zero_point", True):
        raise table.unsupported("zero_point", "supported: true")
    version = table.value(table.spelling("version", "format"))
    if version is not None and str(version).lower() != "gemm":
        raise table.unsupported(table.spelling("version", "format"), "supported: gemm")
    return Scheme(layout="awq", group_size=_group_size(table), has_zeros=True)


def _gptq(table: JsonFields) -> Scheme:
    table.ignore(*_GPTQ_HARMLESS, "desc_act")  # g_idx has the order of columns
    _four_bits(table)
    table.choice("pack_dtype", ("int32",), "int32")
    name = table.spelling("checkpoint_format", "format")
    layout = table.choice(name, ("gptq", "gptq_v2"), "gptq")
    size = _group_size(table)
    return Scheme(
        layout="gptq_v2" if layout == "gptq_v2" else "gptq", group_size=size, has_zeros=True
    )


def _fbgemm(table: JsonFields) -> Scheme:
    table.ignore("activation_scale_ub", "modules_to_not_convert")
    return Scheme(layout="fp8 rows")


def _fp8_rows(table: JsonFields) -> Scheme:
    """quant_method fp8 without weight_block_size: a scale per matrix or row."""
    table.choice("fmt", ("e4m3",), "e4m3")
    table.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    table.ignore("modules_to_not_convert", "ignored_layers", "weight_block_size")
    if table.boolean("dequantize", False):
        raise table.unsupported("dequantize", "set it to false, and choose with --dtype")
    return Scheme(layout="fp8 rows")


def _mxfp4(table: JsonFields) -> Scheme:
    table.ignore("modules_to_not_convert")
    if table.boolean("dequantize", False):
        raise table.unsupported("dequantize", "set it to false, and choose with --dtype")
    return Scheme(layout="mxfp4 blocks")


def is_vendors(table: JsonFields) -> bool:
    """Whether `vendor_quantization` parses this quantization_config."""
    method = table.value("quant_method")
    return method in VENDORS and not (method == "fp8" and table.present("weight_block_size"))


_SCHEMES: Mapping[str, Callable[[JsonFields], Scheme]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fbgemm_fp8": _fbgemm,
    "fp8": _fp8_rows,
    "mxfp4": _mxfp4,
}
"""Parsers by quant_method, of those with one scheme."""
VENDORS = (COMPRESSED_TENSORS, *_SCHEMES)
"""Values of quant_method; fp8 with weight_block_size is in `quantization`."""
