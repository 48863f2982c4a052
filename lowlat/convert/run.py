"""One conversion from start to end: checkpoint in, Hugging Face folder out, tensor by tensor.

Owns the options and the report. The new attention form is `convert.exact`'s, file formats and the
atomic destination are `checkpoint`'s.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowlat.checkpoint.dense import DenseSource
from lowlat.checkpoint.index import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.checkpoint.mapping import check_tensors, file_name, operations, settle_mtp
from lowlat.checkpoint.place import fit
from lowlat.checkpoint.save import text_files, write_checkpoint
from lowlat.checkpoint.source import TensorSource
from lowlat.config.arithmetic import cache_cost, count_parameters
from lowlat.config.attention import short_name
from lowlat.config.hf import config_to_hf
from lowlat.config.model import AttentionConfig, GQAConfig, MLAConfig, ModelConfig
from lowlat.convert.exact import check_exact, mla_config, mla_parameters
from lowlat.model.transformer import Transformer
from lowlat.utils.device import parse_dtype
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress, Task

STORED = ("fp32", "bf16", "fp16")
LATER = ("fp8", "int8", "int4")
CACHE_DTYPE = "bf16"
DTYPE_FIELDS = ("dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a conversion did. Cache sizes are those of lowlat with a bf16 cache."""

    source: Path
    """The folder or .gguf file read."""
    destination: Path
    """The folder written."""
    attention_before: str
    """'GQA, 9 heads in 3 groups of 64'."""
    attention_after: str
    """'MLA, 9 heads, latent 192 + rotary key 192'."""
    cache_bytes_per_token_before: int
    """All layers together."""
    cache_bytes_per_token_after: int
    """All layers together."""
    parameters_before: int
    """Without MTP modules; a tied head counts once."""
    parameters_after: int
    """As lowlat loads it: without the padding that files hold for other programs."""
    seconds: float
    """From opening the source to the finished folder."""


def convert(
    src: Path,
    dst: Path,
    *,
    to: str | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Write the model at `src` (folder or .gguf) as the Hugging Face folder `dst`.

    to: "mla" rewrites MHA, GQA or MQA as Multi-head Latent Attention computing the same function;
    None keeps the attention. dtype: fp32, bf16, fp16, or auto, which keeps each tensor's type (fp8
    blocks become bf16, GGUF's fp32). Router biases stay fp32. `dst` appears complete or not at all.
    Raises UserError for everything the user can cause: options, unfit models, damaged files, an
    existing destination, a full disk.
    """
    start = time.perf_counter()
    wanted = _stored_dtype(to, dtype)
    source = open_checkpoint(src)
    config = settle_mtp(read_config(source), source)
    if config.quantization is not None:
        source = DenseSource(source, config.quantization, wanted or torch.bfloat16)
        config = replace(config, quantization=None)
    converted = mla_config(config) if to == "mla" else config
    expected = _expected_tensors(config)
    check_tensors(config, source, expected)
    raw = config_to_hf(converted) if to == "mla" else _kept_fields(source)
    raw["dtype"] = _dtype_name(source, expected, wanted)
    total = sum(_stored_bytes(source, name) for name in expected)
    with (progress or SilentProgress()).task(f"Converting {src.name}", total, "bytes") as task:
        reader = _Reader(source, config, wanted, task)
        if to == "mla":
            tensors = _mla_tensors(reader, check_exact(config), converted)
        else:
            tensors = _kept_tensors(reader, expected)
        write_checkpoint(dst, raw, tensors, extra_files=text_files(src))
    return _report(src, dst, config, converted, time.perf_counter() - start)


def describe_attention(attention: AttentionConfig) -> str:
    """The form of attention in a few words."""
    heads = attention.num_attention_heads
    if isinstance(attention, MLAConfig):
        latent, rotary = attention.kv_lora_rank, attention.qk_rope_head_dim
        return f"MLA, {heads} heads, latent {latent} + rotary key {rotary}"
    if not isinstance(attention, GQAConfig):
        return f"{short_name(attention)}, {heads} heads"
    groups, head_dim = attention.num_key_value_heads, attention.head_dim
    if groups == heads:
        return f"MHA, {heads} heads of {head_dim}"
    if groups == 1:
        return f"MQA, {heads} heads sharing one key and value of {head_dim}"
    return f"GQA, {heads} heads in {groups} groups of {head_dim}"


class _Reader:
    """Reads source tensors in the wanted number type; remembers them until their pages may go."""

    def __init__(
        self, source: TensorSource, config: ModelConfig, dtype: torch.dtype | None, task: Task
    ) -> None:
        self._source = source
        self._config = config
        self._dtype = dtype
        self._task = task
        self._read: list[str] = []

    def parameter(self, name: str) -> Tensor:
        """A parameter of the source model, by the model's name."""
        return self.tensor(file_name(self._config, name))

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the file."""
        stored = self._source.read(name)
        self._read.append(name)
        return fit(stored, name, self._source.where(name), False, self._dtype)

    def release(self) -> None:
        """Nothing read so far is needed any more."""
        for name in self._read:
            self._source.release(name)
            self._task.advance(_stored_bytes(self._source, name))
        self._read.clear()


def _stored_dtype(to: str | None, dtype: str) -> torch.dtype | None:
    """The type to cast to, None to keep. Raises UserError for options that ask for nothing."""
    if to not in (None, "mla"):
        raise UserError(f"--to '{to}' is unknown; the only form to convert to is mla")
    if dtype in LATER:
        raise UserError(
            f"--dtype {dtype} is not written by this release; choose {', '.join(STORED)} or auto"
        )
    if dtype not in (*STORED, "auto"):
        raise UserError(f"--dtype '{dtype}' is unknown; choose {', '.join(STORED)} or auto")
    if to is None and dtype == "auto":
        raise UserError(f"nothing to convert; give --to mla, --dtype ({', '.join(STORED)}) or both")
    return None if dtype == "auto" else parse_dtype(dtype)


def _expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors a checkpoint of `config` has."""
    shapes = {name: tuple(p.shape) for name, p in _empty_parameters(config).items()}
    plan = operations(config, shapes)
    return {file: shape for step in plan for file, shape in step.file_shapes(shapes).items()}


def _empty_parameters(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return Transformer(config).state_dict()


def _mla_tensors(
    reader: _Reader, attention: GQAConfig, converted: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    read = mla_parameters(reader.parameter, attention)
    for operation in operations(converted, _empty_parameters(converted)):
        yield from operation.save(read)
        reader.release()


def _kept_tensors(reader: _Reader, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, reader.tensor(name)
        reader.release()


def _kept_fields(source: TensorSource) -> dict[str, Any]:
    """The source's own config.json without what says how numbers are stored."""
    return {key: value for key, value in source.hf_config.items() if key not in DTYPE_FIELDS}


def _dtype_name(source: TensorSource, names: Iterable[str], wanted: torch.dtype | None) -> str:
    """What config.json says: the wanted type, or the widest stored, so that nothing is narrowed."""
    widest = wanted or reduce(torch.promote_types, {source.dtype(name) for name in names})
    return str(widest).removeprefix("torch.")


def _stored_bytes(source: TensorSource, name: str) -> int:
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


def _report(
    src: Path, dst: Path, config: ModelConfig, converted: ModelConfig, seconds: float
) -> Report:
    before, after = cache_cost(config), cache_cost(converted)
    return Report(
        source=src,
        destination=dst,
        attention_before=describe_attention(config.attention),
        attention_after=describe_attention(converted.attention),
        cache_bytes_per_token_before=before.bytes_per_token(
            before.elements_per_token_layer, CACHE_DTYPE
        ),
        cache_bytes_per_token_after=after.bytes_per_token(
            after.elements_per_token_layer, CACHE_DTYPE
        ),
        parameters_before=count_parameters(config).total,
        parameters_after=count_parameters(converted).total,
        seconds=seconds,
    )
