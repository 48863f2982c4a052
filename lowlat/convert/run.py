"""`convert`: one conversion from start to end, checkpoint in, folder or GGUF file out."""

import json
import logging
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowlat.checkpoint.file_layout import FileLayout
from lowlat.checkpoint.fill_parameters import fit
from lowlat.checkpoint.resumable_writer import partial_path, require_free_space, write_resumable
from lowlat.checkpoint.save import files_of_source
from lowlat.checkpoint.shard_layout import INDEX_FILE, plan_shards
from lowlat.config.hf.writer import config_to_hf
from lowlat.convert.compression.calibration import Calibration, read_calibration
from lowlat.convert.compression.compress import CompressionReport, compress
from lowlat.convert.compression.scratch import digest_of, scratch_folder
from lowlat.convert.conversion import (
    Conversion,
    attention_dtype,
    is_attention,
    prepare_conversion,
)
from lowlat.convert.options import CALIBRATED, CompressionOptions, ConversionOptions
from lowlat.convert.parameters.exact_mla import check_exact, mla_config, mla_parameters
from lowlat.convert.parameters.upcycle import UpcycledWeights
from lowlat.convert.parameters.weights import (
    DerivedWeights,
    SourceWeights,
    Weights,
    parameter_shapes,
)
from lowlat.convert.quantization.activations import ActivationStatistics, activation_windows
from lowlat.convert.report import ConversionReport, compression_object, measure, report_files
from lowlat.convert.storage.folder import PLAIN, StorageType, stored_config, stored_groups
from lowlat.convert.storage.gguf import stored_gguf
from lowlat.text.folder import TOKENIZER_FILE, read_folder
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

STORAGE_FIELDS = ("dtype", "torch_dtype", "quantization_config", "quantization")
"""Fields of a config.json that describe data types."""

_log = logging.getLogger(__name__)


def convert(
    src: Path,
    dst: Path,
    *,
    to: str | None = None,
    dtype: str = "auto",
    file_format: str = "auto",
    compression: CompressionOptions | None = None,
    experts: int | None = None,
    calibrate: tuple[Path, ...] = (),
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert the model at `src` (folder or .gguf) to `dst`, a Hugging Face folder or .gguf file.

    Options are those of `ConversionOptions`. to: "mla" converts MHA, GQA or MQA to Multi-head
    Latent Attention: exactly, or with `compression` to a smaller KV cache. experts: sparse
    upcycling of a dense model (`convert.parameters.upcycle`). dtype "auto" keeps each tensor's
    type; fp8 blocks become bf16, GGUF blocks fp32. Quantised weights are dequantised in fp32
    first. Router biases stay fp32. int8 and int4 choose their scales by error weighted with the
    activations of calibration text, the files `calibrate` or the bundled text.

    `dst` appears complete or not at all. After an interruption the same call resumes. Raises
    UserError for errors a user can cause: options, unsupported models, damaged files, an existing
    destination, a full disk.
    """
    options = ConversionOptions(
        to=to,
        dtype=dtype,
        file_format=file_format,
        compression=compression,
        experts=experts,
        calibrate=calibrate,
    )
    start = time.perf_counter()
    conversion = prepare_conversion(src, dst, options)
    fingerprint = conversion.fingerprint()
    progress = progress or SilentProgress()
    with ExitStack() as until_written:
        weights, compressed = _converted(conversion, fingerprint, until_written, progress)
        statistics = _statistics(conversion, weights, fingerprint, until_written, progress)
        if conversion.writes_gguf:
            storage_type, extra = conversion.storage_type, {}
            files = [stored_gguf(weights, storage_type, src, dst.name, statistics)]
        else:
            files, extra = _folder_files(conversion, weights, statistics)
            if compressed is not None:
                report = compression_object(compressed, conversion.config, weights.config)
                extra = report_files(report) | extra
        title, is_file = f"Converting {src.name}", conversion.writes_gguf
        write_resumable(dst, files, extra, fingerprint, progress, title, is_file=is_file)
    seconds = time.perf_counter() - start
    report = measure(src, dst, conversion.config, weights.config, seconds)
    return replace(report, compression=compressed)


def _converted(
    conversion: Conversion,
    fingerprint: dict[str, str],
    until_written: ExitStack,
    progress: Progress,
) -> tuple[Weights, CompressionReport | None]:
    """The weights of the converted model, before they are rounded."""
    base, storage_type = conversion.base(), conversion.storage_type
    options, compressed = conversion.options, None
    if options.compression is not None:
        _check_disk_space(conversion.dst.absolute(), base, storage_type)
        scratch = until_written.enter_context(scratch_folder(conversion.dst))
        weights, compressed = _compressed_weights(conversion, base, scratch, progress)
        # A partial result must contain the same tensors, but the calibration text may have
        # changed, and another CPU may round differently.
        fingerprint["calibration"] = digest_of(scratch)
    else:
        weights = _exact_mla_weights(base, storage_type) if options.to == "mla" else base
    if options.experts is not None:
        weights = UpcycledWeights(weights, options.experts)
    return weights, compressed


def _statistics(
    conversion: Conversion,
    weights: Weights,
    fingerprint: dict[str, str],
    until_written: ExitStack,
    progress: Progress,
) -> ActivationStatistics | None:
    """Activation statistics for int8 and int4; None for other types, and for a packed model that is
    only stored in another format, whose min-max scales give its numbers back.
    """
    is_repacked = conversion.options.dtype == "auto" and isinstance(weights, SourceWeights)
    if conversion.storage_type not in CALIBRATED or is_repacked:
        return None
    text, layers = _quantization_text(conversion), weights.config.num_hidden_layers
    fingerprint["calibration text"] = "none" if text is None else text.digest()
    if text is None:
        return ActivationStatistics(weights, None)
    task = until_written.enter_context(progress.task("Measuring activations", layers, "items"))
    windows, with_covariance = activation_windows(text.windows), conversion.storage_type == "int4"
    return ActivationStatistics(weights, windows, task, with_covariance=with_covariance)


def _compressed_weights(
    conversion: Conversion, base: Weights, scratch: Path, progress: Progress
) -> tuple[Weights, CompressionReport]:
    """The source model compressed. Raises UserError as `compress`, and for unfit text."""
    options = conversion.options.compression
    assert options is not None
    return compress(
        base,
        _calibration(conversion),
        share=options.share,
        method=options.method,
        layout=options.layout,
        scratch=scratch,
        dtype=attention_dtype(base, conversion.storage_type),
        progress=progress,
    )


def _calibration(conversion: Conversion) -> Calibration:
    """Windows of the calibration text. Raises UserError for text or a tokenizer that is unfit."""
    src, config, options = conversion.src, conversion.config, conversion.options
    calibration, texts = None, options.calibrate
    if options.compression is not None:
        calibration, texts = options.compression.calibration, options.compression.calibrate
    if calibration is None:
        tokenizer = Tokenizer.from_folder(src) if src.is_dir() else Tokenizer.from_gguf(src)
        calibration = read_calibration(texts, tokenizer, config.max_position_embeddings)
    most = max(int(part.max()) for part in (calibration.windows, calibration.held_out))
    if most >= config.vocab_size:
        raise UserError(
            f"{src}: its tokenizer returns token {most}, but the model has {config.vocab_size} "
            "tokens; restore the tokenizer that belongs to it"
        )
    return calibration


def _quantization_text(conversion: Conversion) -> Calibration | None:
    """Text to measure activations on; None, with a warning, without usable text.

    Raises UserError for text of --calibrate that is unfit.
    """
    try:
        return _calibration(conversion)
    except UserError as error:
        if conversion.options.calibrate:
            raise
        _log.warning("scales are chosen by unweighted error, as no text can be used: %s", error)
        return None


def _exact_mla_weights(base: Weights, storage_type: StorageType | None) -> Weights:
    """The model with exact MLA. Raises UserError if its attention cannot be expressed so."""
    attention, converted = check_exact(base.config), mla_config(base.config)
    dtype = None if storage_type is None else PLAIN.get(storage_type)

    def read(name: str) -> Tensor:
        return fit(base.read(name), name, base.where(name), False, dtype)

    derived = mla_parameters(read, attention, base.config.rope_of(0))
    return DerivedWeights(
        base,
        converted,
        derived,
        derives=is_attention,
        dtype=attention_dtype(base, storage_type),
    )


def _check_disk_space(dst: Path, base: Weights, storage_type: StorageType | None) -> None:
    """Raises UserError if the disk has too little free space for the tensors that compression does
    not change, whose size is known in advance.
    """
    if partial_path(dst).exists():  # already contains some of them
        return
    tensors = (tensor for group in stored_groups(base, storage_type) for tensor in group.tensors)
    require_free_space(dst, sum(each.nbytes for each in tensors if not is_attention(each.name)))


def _folder_files(
    conversion: Conversion, weights: Weights, statistics: ActivationStatistics | None
) -> tuple[list[FileLayout], dict[str, bytes]]:
    """Planned shards of a Hugging Face folder, and its config, tokenizer and index files."""
    is_unchanged = isinstance(weights, SourceWeights)
    raw = _config_fields(conversion, weights, is_unchanged=is_unchanged)
    files, index = plan_shards(stored_groups(weights, conversion.storage_type, statistics))
    others = {"config.json": (json.dumps(raw, indent=2) + "\n").encode()}
    others |= _files_of_source(conversion.src, conversion.dst)
    return files, others | ({} if index is None else {INDEX_FILE: index})


def _config_fields(
    conversion: Conversion, weights: Weights, *, is_unchanged: bool
) -> dict[str, Any]:
    """config.json. An unchanged model keeps its own fields, except those of data types."""
    source, storage_type = conversion.tensors, conversion.storage_type
    config = stored_config(weights.config, storage_type)
    if is_unchanged:
        raw = {key: value for key, value in source.hf_config.items() if key not in STORAGE_FIELDS}
        if config != weights.config:
            raw |= {k: v for k, v in config_to_hf(config).items() if k in STORAGE_FIELDS}
    else:
        raw = config_to_hf(config)
    if storage_type is None:
        # the widest stored type, so that no program rounds a tensor
        names = parameter_shapes(weights.config)
        plain = reduce(torch.promote_types, {weights.dtype(name) for name in names})
    else:
        plain = PLAIN.get(storage_type, torch.bfloat16)
    return raw | {"dtype": str(plain).removeprefix("torch.")}


def _files_of_source(src: Path, dst: Path) -> dict[str, bytes]:
    """The source's tokenizer files and GGUF metadata; logs a warning if lowlat cannot read the
    tokenizer.
    """
    files = files_of_source(src)
    try:
        if src.is_dir():
            read_folder(src)
        elif TOKENIZER_FILE not in files:
            raise UserError(f"{src}: holds no vocabulary; copy the original model's tokenizer.json")
    except UserError as error:
        _log.warning("%s: has no usable tokenizer: %s", dst, error)
    return files
