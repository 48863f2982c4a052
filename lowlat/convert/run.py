"""One conversion from start to end: checkpoint in, folder or GGUF file out, tensor by tensor.

Owns options, the order of things and the report. Which numbers come out is `convert.weights`'s and
the recipes', how they are stored `convert.store`'s and `convert.store_gguf`'s; file formats and the
atomic destination are `checkpoint`'s.
"""

import hashlib
import json
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lowlat.checkpoint.dequantized_source import dequantized_source
from lowlat.checkpoint.fill_parameters import fit
from lowlat.checkpoint.gguf.metadata_writer import architecture_of
from lowlat.checkpoint.hf_folder import INDEX_FILE, open_checkpoint, weight_files
from lowlat.checkpoint.load import config_file, read_config
from lowlat.checkpoint.mapping import resolve_mtp_modules
from lowlat.checkpoint.resumable_writer import (
    options_text,
    partial_path,
    require_free_space,
    write_resumable,
)
from lowlat.checkpoint.save import text_files
from lowlat.checkpoint.shard_layout import plan_shards
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import ModelConfig
from lowlat.convert.compression import (
    Compression,
    check_compression,
    check_reach,
    compressed_weights,
    scratch_folder,
)
from lowlat.convert.exact import check_exact, mla_config, mla_parameters
from lowlat.convert.report import Report, compression_object, measure, report_files
from lowlat.convert.scratch import digest_of
from lowlat.convert.store import PLAIN, Form, stored_config, stored_groups
from lowlat.convert.store_gguf import KINDS, stored_gguf
from lowlat.convert.upcycle import UpcycledWeights, upcycled_config
from lowlat.convert.weights import DerivedWeights, SourceWeights, Weights, parameter_shapes
from lowlat.text.folder import read_folder
from lowlat.utils.atomic_files import refuse_existing
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

FORMS: dict[str, Form] = {form: form for form in get_args(Form)}
FORMATS = ("auto", "hf", "gguf")
GGUF_SUFFIX = ".gguf"
STORAGE_FIELDS = ("dtype", "torch_dtype", "quantization_config", "quantization")
"""Fields of a config.json that say how numbers are stored."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A conversion that can begin: options and source, checked."""

    src: Path
    """The folder or .gguf file to read."""
    dst: Path
    """What to write."""
    to: str | None
    """The form of attention: mla, or None for the source's own."""
    dtype: str
    """As asked for."""
    form: Form | None
    """What that stores; None keeps the type of every tensor."""
    is_gguf: bool
    """Whether `dst` is a .gguf file."""
    compression: Compression | None
    """To a smaller cache; None for exact conversions."""
    experts: int | None
    """Routed experts to make of every dense layer; None to keep layers dense."""
    opened: TensorSource
    """The tensors of `src`."""
    found: ModelConfig
    """Its config."""

    def identity(self) -> dict[str, str]:
        """What distinguishes it from other conversions to `dst`."""
        options: dict[str, Any] = {"to": self.to, "dtype": self.dtype}
        options["format"] = "gguf" if self.is_gguf else "hf"
        if self.compression is not None:
            options["compression"] = self.compression.words()
        if self.experts is not None:
            options["experts"] = self.experts
        return {
            "source": fingerprint(self.src),
            "version of lowlat": version("lowlat"),
            "options": options_text(options),
        }

    def base(self) -> SourceWeights:
        """The weights as they are to be converted."""
        source, config = dequantized_source(self.opened, self.found, _exact_dtype(self.form))
        return SourceWeights(source, config, pads=self.found.packing is None)

    def stored_dtype(self) -> str:
        """`dtype` by name: what auto means for the matrices of this source."""
        if self.form is not None:
            return self.form
        widest = _widest(self.base(), None)
        return next((name for name, dtype in PLAIN.items() if dtype == widest), "fp32")


def convert(
    src: Path,
    dst: Path,
    *,
    to: str | None = None,
    dtype: str = "auto",
    file_format: str = "auto",
    compression: Compression | None = None,
    experts: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the model at `src` (folder or .gguf) as `dst`, a Hugging Face folder or a .gguf file.

    to: "mla" rewrites MHA, GQA or MQA as Multi-head Latent Attention computing the same function,
    or with `compression` nearly the same from a smaller cache; None keeps the attention. experts:
    that many routed experts of every dense layer, which compute the same (`upcycle`). dtype:
    fp32, bf16, fp16, fp8 (128x128 blocks as released), int8 or int4 (packed as loading does it;
    Q8_0 and Q4_1 in GGUF), or auto, which keeps each tensor's type (fp8 blocks become bf16, GGUF's
    blocks fp32). Numbers stored in fewer bits are multiplied out in fp32 first. Router biases stay
    fp32. file_format: hf, gguf, or auto, which goes by the name of `dst`.

    `dst` appears complete or not at all. What an interrupted conversion leaves beside it is where
    the same call goes on. Raises UserError for everything the user can cause: options, unfit
    models, damaged files, an existing destination, a full disk.
    """
    start = time.perf_counter()
    job = check(
        src,
        dst,
        to=to,
        dtype=dtype,
        file_format=file_format,
        compression=compression,
        experts=experts,
    )
    base, form, identity = job.base(), job.form, job.identity()
    progress = progress or SilentProgress()
    with ExitStack() as until_written:
        extra, cost = {}, None
        if compression is not None:
            _check_room(dst.absolute(), base, form)
            scratch = until_written.enter_context(scratch_folder(dst))
            weights, cost = compressed_weights(
                base, src, compression, scratch, _widest(base, form), progress
            )
            # Segments that are there already must be of the very same tensors: texts may have
            # changed, and another processor rounds another way.
            identity["calibration"] = digest_of(scratch)
            extra |= report_files(compression_object(cost, job.found, weights.config))
        else:
            weights = _mla_weights(base, form) if to == "mla" else base
        if experts is not None:
            weights = UpcycledWeights(weights, experts)
        if job.is_gguf:
            files, extra = [stored_gguf(weights, form, src, dst.name)], {}
        else:
            raw = _config_fields(job.opened, weights, form, keeps=weights is base)
            files, index = plan_shards(stored_groups(weights, form))
            extra["config.json"] = (json.dumps(raw, indent=2) + "\n").encode()
            extra |= _text(src, dst) | ({} if index is None else {INDEX_FILE: index})
        write_resumable(
            dst,
            files,
            extra,
            identity,
            progress,
            f"Converting {src.name}",
            is_file=job.is_gguf,
        )
    seconds = time.perf_counter() - start
    return replace(measure(src, dst, job.found, weights.config, seconds), compression=cost)


def check(
    src: Path,
    dst: Path,
    *,
    to: str | None,
    dtype: str,
    file_format: str,
    compression: Compression | None,
    experts: int | None,
) -> Job:
    """What `convert` of the same arguments is to do. Raises its errors as far as they can be known
    before any work.
    """
    form, is_gguf = check_options(
        dst, to=to, dtype=dtype, file_format=file_format, compression=compression
    )
    is_same = to is None and experts is None and is_gguf == _is_gguf(src)
    if is_same and form is None:
        raise UserError(
            f"nothing to convert; give --to mla, --dtype ({', '.join(FORMS)}), another --format, "
            "--experts, or several of them"
        )
    opened = open_checkpoint(src)
    found = resolve_mtp_modules(read_config(opened), opened)
    if is_same and form == _stored_form(found):
        raise UserError(f"{src}: nothing to convert; its weights are {form} already")
    if to == "mla":
        check_exact(found, config_file(opened))
    if compression is not None:
        check_reach(compression, found)
    if experts is not None:
        upcycled_config(mla_config(found) if to == "mla" else found, experts)
    if to == "mla" and is_gguf:
        architecture_of(mla_config(found))
    return Job(
        src=src,
        dst=dst,
        to=to,
        dtype=dtype,
        # what is packed stays so unless another type is asked for
        form=form or found.packing,
        is_gguf=is_gguf,
        compression=compression,
        experts=experts,
        opened=opened,
        found=found,
    )


def check_options(
    dst: Path, *, to: str | None, dtype: str, file_format: str, compression: Compression | None
) -> tuple[Form | None, bool]:
    """The form to store (None to keep) and whether in GGUF, whatever is converted. Raises UserError
    for unknown options and for combinations that do not exist.
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
    if compression is not None:
        check_compression(compression, to)
    refuse_existing(dst.absolute())
    return form, is_gguf


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == GGUF_SUFFIX and not path.is_dir()


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

    derived = mla_parameters(read, attention, base.config.rope_of(0))
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


def _check_room(dst: Path, base: Weights, form: Form | None) -> None:
    """Raises UserError where the disk cannot take what a compression leaves as it is: so much of
    the result's size is known before the work.
    """
    if partial_path(dst).exists():  # with some of it
        return
    tensors = (tensor for group in stored_groups(base, form) for tensor in group.tensors)
    require_free_space(dst, sum(each.size for each in tensors if not _is_attention(each.name)))


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


def _text(src: Path, dst: Path) -> dict[str, bytes]:
    """The tokenizer's files; where there are none that lowlat reads, a warning says so."""
    files = text_files(src)
    try:
        if src.is_dir():
            read_folder(src)
        elif not files:
            raise UserError(f"{src}: holds no vocabulary; copy the original model's tokenizer.json")
    except UserError as error:
        _log.warning("%s: is made without a usable tokenizer: %s", dst, error)
    return files


def fingerprint(src: Path) -> str:
    """The source, and what would change if it were another."""
    facts: list[Any] = []
    if src.is_dir():
        facts.append((src / "config.json").read_text(encoding="utf-8"))
    for file in weight_files(src):
        stat = file.stat()
        facts.append([file.name, stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return f"{src.resolve()} {digest}"
