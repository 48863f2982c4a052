"""A conversion ready to run: options checked against the source model, and its fingerprint."""

import hashlib
import json
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lowlat.checkpoint.dequantized_source import dequantized_source
from lowlat.checkpoint.gguf.metadata_writer import architecture_of
from lowlat.checkpoint.hf_folder import open_checkpoint, weight_files
from lowlat.checkpoint.load import config_file, read_config
from lowlat.checkpoint.mapping import resolve_mtp_modules
from lowlat.checkpoint.resumable_writer import options_text
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.checkpoint.vendors.parts import VendorWeight
from lowlat.config.model import ModelConfig
from lowlat.convert.compression.budget import STEP, entry_budget
from lowlat.convert.compression.methods import METHODS
from lowlat.convert.options import STORAGE_TYPES, CompressionOptions, ConversionOptions, is_gguf
from lowlat.convert.parameters.exact_mla import check_exact, mla_config
from lowlat.convert.parameters.upcycle import upcycled_config
from lowlat.convert.parameters.weights import SourceWeights, Weights, parameter_shapes
from lowlat.convert.storage.folder import PLAIN, StorageType
from lowlat.utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """Checked options and their source."""

    src: Path
    """The folder or .gguf file to read."""
    dst: Path
    """The folder or .gguf file to write."""
    options: ConversionOptions
    storage_type: StorageType | None
    """None keeps the type of every tensor."""
    tensors: TensorSource
    """The tensors of `src`."""
    config: ModelConfig
    """The config of `src`."""

    @property
    def writes_gguf(self) -> bool:
        """Whether `dst` is a .gguf file."""
        return self.options.writes_gguf(self.dst)

    def fingerprint(self) -> dict[str, str]:
        """Source, version and options; an interrupted conversion resumes only if all match."""
        own = self.options
        options: dict[str, Any] = {"to": own.to, "dtype": own.dtype}
        options["format"] = "gguf" if self.writes_gguf else "hf"
        if own.compression is not None:
            options["compression"] = own.compression.fingerprint()
        if own.experts is not None:
            options["experts"] = own.experts
        return {
            "source": source_fingerprint(self.src),
            "version of lowlat": version("lowlat"),
            "options": options_text(options),
        }

    def base(self) -> SourceWeights:
        """The source's weights, with fp8 blocks and packed weights dequantized."""
        # fp32 for quantised storage types, so that weights are rounded once, when written
        dtype = PLAIN.get(self.storage_type or "bf16", torch.float32)
        source, config = dequantized_source(self.tensors, self.config, dtype)
        return SourceWeights(source, config, stored=self.config)

    def stored_dtype(self) -> str:
        """Name of the storage type; for auto, the type of the widest attention matrix."""
        if self.storage_type is not None:
            return self.storage_type
        widest = attention_dtype(self.base(), None)
        return next((name for name, dtype in PLAIN.items() if dtype == widest), "fp32")


def prepare_conversion(src: Path, dst: Path, options: ConversionOptions) -> Conversion:
    """Open `src` and check `options` against it. Raises UserError for every error that is
    detectable before the conversion.
    """
    options.check(dst)
    storage_type, writes_gguf = options.storage_type, options.writes_gguf(dst)
    is_same = options.to is None and options.experts is None and writes_gguf == is_gguf(src)
    if is_same and storage_type is None:
        raise UserError(
            f"nothing to convert; give --to mla, --dtype ({', '.join(STORAGE_TYPES)}), another "
            "--format, --experts, or several of them"
        )
    tensors = open_checkpoint(src)
    config = resolve_mtp_modules(read_config(tensors), tensors)
    if storage_type is None and _is_vendors(tensors):
        raise UserError(
            f"{src}: a conversion does not write the format of its quantized weights; choose the "
            "data type with --dtype (bf16, fp8, int8, int4)"
        )
    if is_same and storage_type == _quantized_type(config):
        raise UserError(f"{src}: nothing to convert; its weights are {storage_type} already")
    if options.to == "mla":
        check_exact(config, config_file(tensors))
    if options.compression is not None:
        _check_share(options.compression, config)
    if options.experts is not None:
        upcycled_config(mla_config(config) if options.to == "mla" else config, options.experts)
    if options.to == "mla" and writes_gguf:
        architecture_of(mla_config(config))
    return Conversion(
        src=src,
        dst=dst,
        options=options,
        # packed weights stay packed unless another type is requested
        storage_type=storage_type or config.packing,
        tensors=tensors,
        config=config,
    )


def is_attention(name: str) -> bool:
    """Whether a parameter belongs to an attention layer."""
    return ".self_attn." in name


def attention_dtype(base: Weights, storage_type: StorageType | None) -> torch.dtype:
    """The dtype that holds every projection of the attention without loss."""
    names = [name for name in parameter_shapes(base.config) if is_attention(name)]
    stored = None if storage_type is None else PLAIN.get(storage_type)
    return reduce(torch.promote_types, {stored or base.dtype(name) for name in names})


def source_fingerprint(src: Path) -> str:
    """Path of the source, and a hash of its config and of its files' sizes and times."""
    facts: list[Any] = []
    if src.is_dir():
        facts.append((src / "config.json").read_text(encoding="utf-8"))
    for file in weight_files(src):
        stat = file.stat()
        facts.append([file.name, stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return f"{src.resolve()} {digest}"


def _is_vendors(source: TensorSource) -> bool:
    """Whether weights are quantized as no conversion writes them (`checkpoint.vendors`)."""
    return any(isinstance(tensor, VendorWeight) for tensor in source.tensors.values())


def _quantized_type(config: ModelConfig) -> StorageType | None:
    """Quantisation type of a checkpoint's projections; None if they are not quantised."""
    return config.packing or (None if config.quantization is None else "fp8")


def _check_share(compression: CompressionOptions, config: ModelConfig) -> None:
    """Raises UserError if the model cannot be compressed to this share."""
    source = check_exact(config)
    if config.num_nextn_predict_layers:
        raise UserError(
            "--cache: the model has MTP modules, whose attention is not calibrated; leave out "
            "--cache to convert them exactly"
        )
    rotary, entry = METHODS[compression.method].rotary, source.entry_dim

    def rope_channels(budget: int) -> int:
        if rotary is None:
            return 0
        return rotary(source.head_dim, source.num_key_value_heads, budget)

    budgets = range(2 * STEP, entry, STEP)
    least = next((each for each in budgets if rope_channels(each) + STEP <= each), entry)
    why = (
        f" (--method {compression.method}: {rope_channels(least)} for the rotary key and {STEP} "
        f"more, in multiples of {STEP})"
    )
    entry_budget(compression.share, entry, least, why if rope_channels(least) else "")
