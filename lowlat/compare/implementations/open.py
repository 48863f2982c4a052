"""Load the implementation of a parsed name (`ImplementationSpec`)."""

from pathlib import Path

import torch

from lowlat.api import prepare
from lowlat.checkpoint.gguf.file import PLAIN
from lowlat.checkpoint.gguf.split import open_parts
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import load_model, read_config
from lowlat.checkpoint.mapping import resolve_mtp_modules
from lowlat.compare.differences import TOLERANCE
from lowlat.compare.implementations.base import Implementation
from lowlat.compare.implementations.lowlat_native import LowlatNative
from lowlat.compare.implementations.lowlat_pytorch import LowlatPyTorch
from lowlat.compare.implementations.peers import DeepSeekModel, LlamaCppModel
from lowlat.compare.implementations.spec import ImplementationSpec
from lowlat.compare.implementations.transformers import load_transformers
from lowlat.config.model import ModelConfig
from lowlat.model.native import supports_native
from lowlat.model.quant import packed_type
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from lowlat.utils.device import dtype_name, parse_cache, parse_dtype
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress


def open_implementation(
    spec: ImplementationSpec, progress: Progress
) -> tuple[Implementation, Path]:
    """The implementation, and the folder or file of its checkpoint. Raises UserError if one of
    them cannot be found, read or run.
    """
    path = prepare(spec.model, progress=progress)
    if spec.backend == "lowlat":
        return _own(spec, path, progress), path
    config = config_of(path)
    if spec.backend == "gguf":
        if path.is_dir():
            raise UserError(f"{spec.text}: '{path}' is a folder; give a .gguf file")
        return LlamaCppModel(path, config, label=spec.text, precision=_stored_in(path)), path
    if not path.is_dir():
        raise UserError(f"{spec.text}: '{path}' is not a checkpoint folder; convert the file first")
    dtype = parse_dtype(spec.dtype)
    if spec.backend == "official":
        script = Path(spec.script).expanduser()
        return DeepSeekModel(script, path, config, label=spec.text, dtype=dtype), path
    return load_transformers(path, config, label=spec.text, dtype=dtype), path


def config_of(path: Path) -> ModelConfig:
    """The config of a checkpoint, with the MTP modules whose tensors it has."""
    source = open_checkpoint(path)
    return resolve_mtp_modules(read_config(source), source)


def _own(spec: ImplementationSpec, path: Path, progress: Progress) -> Implementation:
    dtype = "auto" if spec.dtype == "fp8" else spec.dtype
    model = load_model(path, dtype=dtype, progress=progress).model.requires_grad_(False)
    if spec.dtype == "fp8" and model.config.quantization is None:
        raise UserError(
            f"{spec.text}: '{path}' holds no fp8 blocks; "
            f"make one with: lowlat convert {spec.model} DST --dtype fp8"
        )
    precision = _precision(model)
    if spec.native:
        if not supports_native(model):
            raise UserError(
                f"{spec.text}: the native kernels are not built here or do not run this model in "
                f"{precision}; leave native out, or use bf16, int8 or int4"
            )
        native.keep_torch_single_threaded()
    kind = LowlatNative if spec.native else LowlatPyTorch
    cache: torch.dtype | None = parse_cache(spec.cache or "auto")
    return kind(model, label=spec.text, precision=precision, form=spec.form, cache=cache)


def _stored_in(path: Path) -> str:
    """The coarsest data type of a GGUF file's matrices, to which llama.cpp also rounds
    activations (to int8 for block formats).
    """
    kinds = [tensor.kind for tensor in open_parts(path).tensors.values() if len(tensor.shape) > 1]
    names = [dtype_name(PLAIN[kind]) if kind in PLAIN else "int8" for kind in kinds]
    return max(["fp32", *names], key=lambda name: TOLERANCE[name])


def _precision(model: Transformer) -> str:
    if model.config.quantization is not None:
        return "fp8"
    return packed_type(model) or dtype_name(model.embed_tokens.dtype)
