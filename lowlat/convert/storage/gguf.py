"""GGUF output of a conversion: the GGML type of every tensor, and its bytes in chunks of rows.

Names, layout and metadata are those of `checkpoint.gguf`.
"""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from lowlat.checkpoint.file_layout import FileLayout
from lowlat.checkpoint.fill_parameters import fit
from lowlat.checkpoint.gguf.blocks import QUANTIZED, encode, fits, row_bytes
from lowlat.checkpoint.gguf.file import PLAIN
from lowlat.checkpoint.gguf.layout import GGUFTensorSpec, plan_gguf
from lowlat.checkpoint.gguf.metadata_writer import architecture_of, gguf_keys, rope_divisors
from lowlat.checkpoint.gguf.tensor_layout import (
    GGUFTensorMapping,
    gguf_tensor_mappings,
)
from lowlat.config.model import ModelConfig
from lowlat.convert.parameters.weights import Shapes, Weights, parameter_shapes
from lowlat.convert.quantization.activations import ActivationStatistics
from lowlat.convert.storage.folder import (
    CHUNK_ELEMENTS,
    StorageType,
    row_pieces,
)
from lowlat.convert.storage.gguf_metadata import kept_metadata
from lowlat.ops.calibrated_quantization import Importance
from lowlat.text.folder import read_folder
from lowlat.text.gguf_keys import end_keys, gguf_vocabulary, has_merges
from lowlat.text.gguf_vocab import has_vocabulary, read_gguf
from lowlat.utils.errors import UserError

GGUF_TYPES: dict[str, GGMLType] = {
    "fp32": GGMLType.F32,
    "bf16": GGMLType.BF16,
    "fp16": GGMLType.F16,
    "int8": GGMLType.Q8_0,
    "int4": GGMLType.Q4_1,
}
FLOATS = {dtype: ggml_type for ggml_type, dtype in PLAIN.items() if ggml_type != GGMLType.F64}
"""GGML types by dtype; llama.cpp does not compute in F64."""
EIGHT_BITS = ("token_embd", "output", "attn_k_b", "attn_v_b", "attn_kv_b", "nextn.eh_proj")
"""Modules in Q8_0 if others are Q4_1: the int8 modules of int4 models, and the embedding."""
FP32_MODULES = ("ffn_gate_inp", "indexer.proj")
"""Modules in fp32 in every file, like vectors."""
FILE_TYPES = {
    GGMLType.F32: 0,
    GGMLType.F16: 1,
    GGMLType.Q4_1: 3,
    GGMLType.Q8_0: 7,
    GGMLType.BF16: 32,
}
"""general.file_type by the type of most tensors."""
QUANTIZATION_VERSION = 2

_log = logging.getLogger(__name__)


def stored_gguf(
    weights: Weights,
    storage_type: StorageType | None,
    text: Path,
    name: str,
    statistics: ActivationStatistics | None = None,
) -> FileLayout:
    """The planned file `name` of the model. storage_type: None keeps every tensor's data type.
    statistics: of the activations, for int8 and int4.

    text: folder or .gguf file with the vocabulary and chat template. Raises UserError if GGUF
    cannot express the model or its tokenizer; chunks raise it, naming the tensor, for values out of
    range.
    """
    config = weights.config
    arch = architecture_of(config)
    keys = gguf_keys(config, arch)
    shapes = parameter_shapes(config)
    tensors = [
        _tensor(weights, part, _kind(weights, part, storage_type), shapes, statistics)
        for part in gguf_tensor_mappings(config, arch, shapes)
    ]
    for tensor_name, divisors in rope_divisors(config).items():
        pieces = partial(iter, [divisors])
        shape, size = tuple(divisors.shape), divisors.nbytes
        tensors.append(GGUFTensorSpec(tensor_name, GGMLType.F32, shape, size, pieces))
    keys |= _general(tensors, name)
    kept = kept_metadata(text, config, arch, keys, tensors)
    if not kept.has_vocabulary:
        keys |= _vocabulary(config, text)
    return plan_gguf(name, arch, keys, tensors, kept.entries)


def _tensor(
    weights: Weights,
    part: GGUFTensorMapping,
    ggml_type: GGMLType,
    shapes: Shapes,
    statistics: ActivationStatistics | None,
) -> GGUFTensorSpec:
    # the columns of transposed keys are not the projection's input channels
    is_transposed = part.name.endswith("attn_k_b.weight")
    size = math.prod(part.shape[:-1]) * row_bytes(ggml_type, part.shape[-1])

    def pieces() -> Iterator[Tensor]:
        for parameter in part.parameters:
            where = weights.where(parameter)
            measured = "" if is_transposed else parameter
            importance = statistics and partial(statistics.of, measured)
            encoded = partial(_encoded, ggml_type, parameter, where, importance)
            if part.change is None:
                yield from row_pieces(weights, parameter, shapes[parameter], encoded)
            else:
                yield from _changed(weights, part, parameter, encoded)

    return GGUFTensorSpec(part.name, ggml_type, part.shape, size, pieces)


def _changed(
    weights: Weights, part: GGUFTensorMapping, parameter: str, encoded: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """A parameter with reordered rows, which is in memory as a whole."""
    assert part.change is not None
    changed = part.change(weights.read(parameter))
    rows = changed.reshape(-1, changed.shape[-1]) if changed.dim() > 1 else changed[None]
    step = max(CHUNK_ELEMENTS // rows.shape[1], 1)
    for start in range(0, len(rows), step):
        yield encoded(rows[start : start + step])
    weights.release(parameter)


def _encoded(
    ggml_type: GGMLType,
    parameter: str,
    where: str,
    importance: Callable[[int], Importance] | None,
    rows: Tensor,
) -> Tensor:
    if ggml_type in PLAIN:
        return fit(rows, parameter, where, False, PLAIN[ggml_type])
    try:
        columns = rows.shape[1]
        return encode(rows, ggml_type, importance and partial(importance, columns))
    except OverflowError as error:
        raise UserError(
            f"{where} has values that are not finite or too large for {ggml_type.name}; use "
            "--dtype bf16"
        ) from error


def _kind(weights: Weights, part: GGUFTensorMapping, storage_type: StorageType | None) -> GGMLType:
    """GGML type of a tensor: fp32 for vectors, the router and head weights of indexers, bf16 if its
    rows do not divide into blocks.
    """
    module = part.name.removesuffix(".weight").removesuffix(".bias")
    if module.startswith("blk."):
        module = module.split(".", 2)[2]
    if len(part.shape) == 1 or module in FP32_MODULES:
        return GGMLType.F32
    if storage_type is None:
        dtype = weights.dtype(part.parameters[0])
        return FLOATS.get(dtype, GGMLType.F32)
    ggml_type = (
        GGMLType.Q8_0
        if storage_type == "int4" and module in EIGHT_BITS
        else GGUF_TYPES[storage_type]
    )
    return ggml_type if fits(ggml_type, part.shape[-1]) else GGMLType.BF16


def _general(tensors: list[GGUFTensorSpec], name: str) -> dict[str, Any]:
    sizes: dict[GGMLType, int] = {}
    for tensor in tensors:
        sizes[tensor.kind] = sizes.get(tensor.kind, 0) + tensor.size
    most = max(sizes, key=lambda ggml_type: sizes[ggml_type])
    keys: dict[str, Any] = {
        "general.name": name.removesuffix(".gguf"),
        "general.file_type": FILE_TYPES[most],
    }
    if any(ggml_type in QUANTIZED for ggml_type in sizes):
        keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys


def _vocabulary(config: ModelConfig, text: Path) -> dict[str, Any]:
    """The source's tokenizer; logs a warning if llama.cpp does not support it."""
    if text.is_dir():
        parts = read_folder(text) if (text / "tokenizer.json").is_file() else None
    else:
        parts = read_gguf(text) if has_vocabulary(text) else None
    if parts is None or not has_merges(parts):
        lack = "no tokenizer" if parts is None else "a tokenizer without merges"
        _log.warning("%s: has %s, so the GGUF file has no vocabulary", text, lack)
        return {"tokenizer.ggml.model": "none"} | _token_ids(config)
    keys = _token_ids(config, has_ends=bool(parts.eos_ids))
    return keys | gguf_vocabulary(parts, config.vocab_size)


def _token_ids(config: ModelConfig, *, has_ends: bool = False) -> dict[str, Any]:
    """Begin and end tokens of the model's config, which those of the tokenizer override.

    has_ends: whether the tokenizer defines end tokens.
    """
    keys: dict[str, Any] = {}
    if config.bos_token_id is not None:
        keys["ggml.bos_token_id"] = config.bos_token_id
    if not has_ends:
        keys |= end_keys(config.eos_token_ids)
    return {f"tokenizer.{key}": value for key, value in keys.items()}
