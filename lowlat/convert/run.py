"""One conversion from start to end: checkpoint in, folder or GGUF file out, tensor by tensor.

Owns options, the order of things and the report. Which numbers come out is `convert.weights`'s and
the recipes', how they are stored `convert.store`'s and `convert.store_gguf`'s; file formats and the
atomic destination are `checkpoint`'s.
"""

import hashlib
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lowlat.checkpoint.dense import dense_source
from lowlat.checkpoint.index import INDEX_FILE, open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.checkpoint.mapping import settle_mtp
from lowlat.checkpoint.place import fit
from lowlat.checkpoint.planned_files import plan_folder
from lowlat.checkpoint.restart import options_text, write_planned
from lowlat.checkpoint.save import refuse_existing, text_files
from lowlat.checkpoint.source import TensorSource
from lowlat.config.arithmetic import cache_cost, count_parameters
from lowlat.config.attention import ModelAttention, distinct, row_widths, short_name
from lowlat.config.hf import config_to_hf
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig
from lowlat.convert.compress import CompressionReport
from lowlat.convert.compression import (
    REPORT_FILE,
    Compression,
    check_compression,
    compressed_weights,
    report_json,
    scratch_folder,
)
from lowlat.convert.exact import check_exact, mla_config, mla_parameters
from lowlat.convert.store import PLAIN, Form, stored_config, stored_groups
from lowlat.convert.store_gguf import KINDS, stored_gguf
from lowlat.convert.weights import DerivedWeights, SourceWeights, Weights, parameter_shapes
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

FORMS: dict[str, Form] = {form: form for form in get_args(Form)}
FORMATS = ("auto", "hf", "gguf")
GGUF_SUFFIX = ".gguf"
CACHE_DTYPE = "bf16"
STORAGE_FIELDS = ("dtype", "torch_dtype", "quantization_config", "quantization")
"""Fields of a config.json that say how numbers are stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a conversion did. Cache sizes are those of lowlat with a bf16 cache."""

    source: Path
    """The folder or .gguf file read."""
    destination: Path
    """The folder or .gguf file written."""
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
    weight_bytes_before: int
    """Size of the files that hold the weights."""
    weight_bytes_after: int
    """The same of the destination."""
    bits_per_weight_before: float
    """Those bytes by the model's parameters, MTP modules included."""
    bits_per_weight_after: float
    """The same of the destination."""
    seconds: float
    """From opening the source to the finished destination."""
    compression: CompressionReport | None = None
    """What a smaller cache cost; None for exact conversions."""


def convert(
    src: Path,
    dst: Path,
    *,
    to: str | None = None,
    dtype: str = "auto",
    file_format: str = "auto",
    compression: Compression | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the model at `src` (folder or .gguf) as `dst`, a Hugging Face folder or a .gguf file.

    to: "mla" rewrites MHA, GQA or MQA as Multi-head Latent Attention computing the same function,
    or with `compression` nearly the same from a smaller cache; None keeps the attention. dtype:
    fp32, bf16, fp16, fp8 (128x128 blocks as released), int8 or int4 (packed as loading does it;
    Q8_0 and Q4_1 in GGUF), or auto, which keeps each tensor's type (fp8 blocks become bf16, GGUF's
    blocks fp32). Numbers stored in fewer bits are multiplied out in fp32 first. Router biases stay
    fp32. file_format: hf, gguf, or auto, which goes by the name of `dst`.

    `dst` appears complete or not at all. What an interrupted conversion leaves beside it is where
    the same call goes on. Raises UserError for everything the user can cause: options, unfit
    models, damaged files, an existing destination, a full disk.
    """
    start = time.perf_counter()
    form, is_gguf = _checked_options(src, dst, to, dtype, file_format)
    if compression is not None:
        check_compression(compression, to)
        refuse_existing(dst.absolute())
    opened = open_checkpoint(src)
    found = settle_mtp(read_config(opened), opened)
    if to is None and is_gguf == _is_gguf(src) and form == _stored_form(found):
        raise UserError(f"{src}: nothing to convert; its weights are {form} already")
    # what is packed stays so unless another type is asked for
    form = form or found.packing
    source, config = dense_source(opened, found, _exact_dtype(form))
    base = SourceWeights(source, config, pads=found.packing is None)
    options: dict[str, Any] = {"to": to, "dtype": dtype, "format": "gguf" if is_gguf else "hf"}
    identity = {"source": _fingerprint(src), "version of lowlat": version("lowlat")}
    progress = progress or SilentProgress()
    with ExitStack() as until_written:
        extra, cost = {}, None
        if compression is not None:
            scratch = until_written.enter_context(scratch_folder(dst))
            weights, cost = compressed_weights(
                base, src, compression, scratch, _widest(base, form), progress
            )
            options |= {"compression": compression.words()}
            extra[REPORT_FILE] = report_json(cost)
        else:
            weights = _mla_weights(base, form) if to == "mla" else base
        if is_gguf:
            files, extra = [stored_gguf(weights, form, src, dst.name)], {}
        else:
            raw = _config_fields(opened, weights, form, keeps=to is None)
            files, index = plan_folder(stored_groups(weights, form))
            extra["config.json"] = (json.dumps(raw, indent=2) + "\n").encode()
            extra |= text_files(src) | ({} if index is None else {INDEX_FILE: index})
        identity["options"] = options_text(options)
        write_planned(dst, files, extra, identity, progress, f"Converting {src.name}")
    seconds = time.perf_counter() - start
    return replace(_report(src, dst, found, weights.config, seconds), compression=cost)


def describe_attention(attention: ModelAttention) -> str:
    """The form of attention in a few words."""
    heads = distinct(attention)[0].num_attention_heads
    if isinstance(attention, MLAConfig | tuple):
        latent, rotary = row_widths(attention)
        each = " by layer" if isinstance(attention, tuple) else ""
        return f"MLA, {heads} heads, latent {latent} + rotary key {rotary}{each}"
    if not isinstance(attention, GQAConfig):
        return f"{short_name(attention)}, {heads} heads"
    groups, head_dim = attention.num_key_value_heads, attention.head_dim
    if groups == heads:
        return f"MHA, {heads} heads of {head_dim}"
    if groups == 1:
        return f"MQA, {heads} heads sharing one key and value of {head_dim}"
    return f"GQA, {heads} heads in {groups} groups of {head_dim}"


def _checked_options(
    src: Path,
    dst: Path,
    to: str | None,
    dtype: str,
    file_format: str,
) -> tuple[Form | None, bool]:
    """The form to store (None to keep) and whether in GGUF. Raises UserError for unknown options
    and for combinations that do not exist.
    """
    if to not in (None, "mla"):
        raise UserError(f"--to '{to}' is unknown; the only form to convert to is mla")
    if dtype not in (*FORMS, "auto"):
        raise UserError(f"--dtype '{dtype}' is unknown; choose {', '.join(FORMS)} or auto")
    if file_format not in FORMATS:
        raise UserError(f"--format '{file_format}' is unknown; choose {', '.join(FORMATS)}")
    is_gguf = file_format == "gguf" or (file_format == "auto" and _is_gguf(dst))
    if is_gguf != _is_gguf(dst):
        rule = "names a file that must end" if is_gguf else "names a folder, which must not end"
        raise UserError(f"{dst}: --format {file_format} {rule} in {GGUF_SUFFIX}")
    form = None if dtype == "auto" else FORMS[dtype]
    if is_gguf and form is not None and form not in KINDS:
        raise UserError(
            f"--dtype {dtype} does not exist in GGUF files; choose {', '.join(KINDS)} or auto"
        )
    if to is None and form is None and is_gguf == _is_gguf(src):
        raise UserError(
            f"nothing to convert; give --to mla, --dtype ({', '.join(FORMS)}), another --format, "
            "or several of them"
        )
    return form, is_gguf


def _is_gguf(path: Path) -> bool:
    return path.suffix == GGUF_SUFFIX


def _stored_form(config: ModelConfig) -> Form | None:
    """The form that all projections of a checkpoint are quantised in; None for plain numbers."""
    return config.packing or (None if config.quantization is None else "fp8")


def _exact_dtype(form: Form | None) -> torch.dtype:
    """What fp8 and packed weights are multiplied out to: they are to be rounded once."""
    return torch.bfloat16 if form is None else PLAIN.get(form, torch.float32)


def _mla_weights(base: Weights, form: Form | None) -> Weights:
    """The exact form of the model as MLA. Raises UserError where there is none."""
    attention, converted = check_exact(base.config), mla_config(base.config)
    wanted = None if form is None else PLAIN.get(form)

    def read(name: str) -> Tensor:
        return fit(base.read(name), name, base.where(name), False, wanted)

    derived = mla_parameters(read, attention)
    return DerivedWeights(
        base, converted, derived, derives=_is_attention, dtype=_widest(base, form)
    )


def _widest(base: Weights, form: Form | None) -> torch.dtype:
    """The number type that holds every projection of the attention."""
    names = [name for name in parameter_shapes(base.config) if _is_attention(name)]
    wanted = None if form is None else PLAIN.get(form)
    return reduce(torch.promote_types, {wanted or base.dtype(name) for name in names})


def _is_attention(name: str) -> bool:
    return ".self_attn." in name


def _config_fields(
    source: TensorSource, weights: Weights, form: Form | None, *, keeps: bool
) -> dict[str, Any]:
    """config.json: the source's own if the model stays the same, but for how numbers are stored."""
    config = stored_config(weights.config, form)
    if keeps:
        raw = {key: value for key, value in source.hf_config.items() if key not in STORAGE_FIELDS}
        if config != weights.config:
            raw |= {k: v for k, v in config_to_hf(config).items() if k in STORAGE_FIELDS}
    else:
        raw = config_to_hf(config)
    if form is None:
        # the widest stored, so that no program narrows anything
        names = parameter_shapes(weights.config)
        plain = reduce(torch.promote_types, {weights.dtype(name) for name in names})
    else:
        plain = PLAIN.get(form, torch.bfloat16)
    return raw | {"dtype": str(plain).removeprefix("torch.")}


def _weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _fingerprint(src: Path) -> str:
    """The source, and what would change if it were another."""
    facts: list[Any] = []
    if src.is_dir():
        facts.append((src / "config.json").read_text(encoding="utf-8"))
    for file in _weight_files(src):
        stat = file.stat()
        facts.append([file.name, stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return f"{src.resolve()} {digest}"


def _report(
    src: Path, dst: Path, config: ModelConfig, converted: ModelConfig, seconds: float
) -> Report:
    costs = cache_cost(config), cache_cost(converted)
    counts = count_parameters(config), count_parameters(converted)
    sizes = [sum(file.stat().st_size for file in _weight_files(path)) for path in (src, dst)]
    bits = [
        8 * size / (count.total + count.mtp + count.mtp_copies * config.mtp_copies)
        for size, count in zip(sizes, counts, strict=True)
    ]
    return Report(
        source=src,
        destination=dst,
        attention_before=describe_attention(config.attention),
        attention_after=describe_attention(converted.attention),
        cache_bytes_per_token_before=costs[0].own_bytes_per_token(CACHE_DTYPE),
        cache_bytes_per_token_after=costs[1].own_bytes_per_token(CACHE_DTYPE),
        parameters_before=counts[0].total,
        parameters_after=counts[1].total,
        weight_bytes_before=sizes[0],
        weight_bytes_after=sizes[1],
        bits_per_weight_before=bits[0],
        bits_per_weight_after=bits[1],
        seconds=seconds,
    )
