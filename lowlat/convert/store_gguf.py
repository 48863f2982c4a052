"""How a converted model is stored in a GGUF file: the type of every tensor, and its bytes piece by
piece.

Owns the choice of types; names, layout and metadata are `checkpoint.gguf_layout`'s and
`checkpoint.gguf_keys`'s.
"""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lowlat.checkpoint.file_layout import FileLayout
from lowlat.checkpoint.fill_parameters import fit
from lowlat.checkpoint.gguf.blocks import QUANTIZED, encode, fits, row_bytes
from lowlat.checkpoint.gguf.file import PLAIN
from lowlat.checkpoint.gguf.layout import GGUFTensorSpec, plan_gguf
from lowlat.checkpoint.gguf.metadata_writer import architecture_of, gguf_keys, rope_divisors
from lowlat.checkpoint.gguf.tensor_layout import (
    ROPE_FACTORS,
    GGUFTensorMapping,
    gguf_tensor_mappings,
)
from lowlat.config.model import ModelConfig
from lowlat.convert.store import CHUNK_ELEMENTS, Form, row_pieces
from lowlat.convert.weights import Shapes, Weights, parameter_shapes
from lowlat.text.folder import read_folder
from lowlat.text.gguf_keys import end_keys, gguf_vocabulary, has_merges
from lowlat.text.gguf_vocab import has_vocabulary, read_gguf
from lowlat.utils.errors import UserError

KINDS: dict[str, Kind] = {
    "fp32": Kind.F32,
    "bf16": Kind.BF16,
    "fp16": Kind.F16,
    "int8": Kind.Q8_0,
    "int4": Kind.Q4_1,
}
FLOATS = {dtype: kind for kind, dtype in PLAIN.items() if kind != Kind.F64}
"""The types that tensors keep; llama.cpp computes with no F64."""
EIGHT_BITS = ("token_embd", "output", "attn_k_b", "attn_v_b", "nextn.eh_proj")
"""Q8_0 beside Q4_1: what int4 models keep in int8, and the embedding."""
FP32_MODULES = ("ffn_gate_inp",)
"""fp32 in every file, as vectors are."""
FILE_TYPES = {Kind.F32: 0, Kind.F16: 1, Kind.Q4_1: 3, Kind.Q8_0: 7, Kind.BF16: 32}
"""general.file_type by the type of most tensors."""
QUANTIZATION_VERSION = 2

_log = logging.getLogger(__name__)


def stored_gguf(weights: Weights, form: Form | None, text: Path, name: str) -> FileLayout:
    """The file `name` of the model; form: None keeps every tensor's number type.

    Vocabulary and chat template are those of the folder or .gguf `text`. Raises UserError where
    llama.cpp's files cannot express the model or its tokenizer; pieces raise it naming a tensor
    with values that do not fit.
    """
    config = weights.config
    arch = architecture_of(config)
    keys = gguf_keys(config, arch)
    shapes = parameter_shapes(config)
    tensors = [
        _tensor(weights, part, _kind(weights, part, form), shapes)
        for part in gguf_tensor_mappings(config, arch, shapes)
    ]
    divisors = rope_divisors(config)
    if divisors is not None:
        size = divisors.nbytes
        shape = tuple(divisors.shape)
        tensors.append(
            GGUFTensorSpec(ROPE_FACTORS, Kind.F32, shape, size, lambda: iter([divisors]))
        )
    keys |= _general(tensors, name) | _vocabulary(config, text)
    return plan_gguf(name, arch, keys, tensors)


def _tensor(
    weights: Weights, part: GGUFTensorMapping, kind: Kind, shapes: Shapes
) -> GGUFTensorSpec:
    size = math.prod(part.shape[:-1]) * row_bytes(kind, part.shape[-1])

    def pieces() -> Iterator[Tensor]:
        for parameter in part.parameters:
            where = weights.where(parameter)

            def encoded(rows: Tensor, parameter: str = parameter, where: str = where) -> Tensor:
                return _encoded(rows, kind, parameter, where)

            if part.change is None:
                yield from row_pieces(weights, parameter, shapes[parameter], encoded)
            else:
                yield from _changed(weights, part, parameter, encoded)

    return GGUFTensorSpec(part.name, kind, part.shape, size, pieces)


def _changed(
    weights: Weights, part: GGUFTensorMapping, parameter: str, encoded: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """A parameter whose rows are put in another order; it is in memory as a whole."""
    assert part.change is not None
    changed = part.change(weights.read(parameter))
    rows = changed.reshape(-1, changed.shape[-1]) if changed.dim() > 1 else changed[None]
    step = max(CHUNK_ELEMENTS // rows.shape[1], 1)
    for start in range(0, len(rows), step):
        yield encoded(rows[start : start + step])
    weights.release(parameter)


def _encoded(rows: Tensor, kind: Kind, parameter: str, where: str) -> Tensor:
    if kind in PLAIN:
        return fit(rows, parameter, where, False, PLAIN[kind])
    try:
        return encode(rows, kind)
    except OverflowError as error:
        raise UserError(
            f"{where} has values that are not finite or too large for {kind.name}; use --dtype bf16"
        ) from error


def _kind(weights: Weights, part: GGUFTensorMapping, form: Form | None) -> Kind:
    """The type of a tensor: fp32 for vectors and the gate, bf16 where rows are no whole blocks."""
    module = part.name.removesuffix(".weight").removesuffix(".bias")
    if module.startswith("blk."):
        module = module.split(".", 2)[2]
    if len(part.shape) == 1 or module in FP32_MODULES:
        return Kind.F32
    if form is None:
        dtype = weights.dtype(part.parameters[0])
        return FLOATS.get(dtype, Kind.F32)
    kind = Kind.Q8_0 if form == "int4" and module in EIGHT_BITS else KINDS[form]
    return kind if fits(kind, part.shape[-1]) else Kind.BF16


def _general(tensors: list[GGUFTensorSpec], name: str) -> dict[str, Any]:
    sizes: dict[Kind, int] = {}
    for tensor in tensors:
        sizes[tensor.kind] = sizes.get(tensor.kind, 0) + tensor.size
    most = max(sizes, key=lambda kind: sizes[kind])
    keys: dict[str, Any] = {
        "general.name": name.removesuffix(".gguf"),
        "general.file_type": FILE_TYPES[most],
    }
    if any(kind in QUANTIZED for kind in sizes):
        keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys


def _vocabulary(config: ModelConfig, text: Path) -> dict[str, Any]:
    """The source's tokenizer; none, with a warning, where it has none that llama.cpp would take."""
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
    """What the model's config says of begin and end. What the tokenizer says goes before; of the
    ends it says all, if it `has_ends`.
    """
    keys: dict[str, Any] = {}
    if config.bos_token_id is not None:
        keys["ggml.bos_token_id"] = config.bos_token_id
    if not has_ends:
        keys |= end_keys(config.eos_token_ids)
    return {f"tokenizer.{key}": value for key, value in keys.items()}
