"""Conversion to a smaller KV cache with recovery training (distillation), evaluation, or both.

`lowlat.convert` compresses, `lowlat.train` distils. An interrupted call resumes from intermediate
results in the work folder.
"""

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.checkpoint.mapping import resolve_mtp_modules
from lowlat.convert.conversion import prepare_conversion
from lowlat.convert.options import CompressionOptions, ConversionOptions, RecoveryOptions
from lowlat.convert.report import REPORT_FILE, ConversionReport, measure, report_files
from lowlat.convert.run import convert
from lowlat.data.dataset import TokenizedDataset
from lowlat.recovery.evaluation import evaluate
from lowlat.recovery.inputs import RecoveryInputs, prepare_recovery, with_calibration
from lowlat.recovery.sparse import convert_to_sparse
from lowlat.recovery.trained_attention import write_recovered
from lowlat.recovery.work_folder import (
    WorkFolder,
    open_work_folder,
    remove_finished_work_folder,
)
from lowlat.train.run.distill import DistillationOptions, distill, distillation_recipe
from lowlat.utils.progress import Progress, SilentProgress


def convert_with_training(
    src: Path, dst: Path, options: ConversionOptions, *, progress: Progress | None = None
) -> ConversionReport:
    """Convert the model at `src` with `options`, which train or evaluate (`options.trains`)."""
    if options.to == "dsa":
        return convert_to_sparse(
            src,
            dst,
            dtype=options.dtype,
            indexer=options.indexer,
            recovery=options.recovery,
            progress=progress,
        )
    return convert_with_recovery(
        src,
        dst,
        to=options.to,
        dtype=options.dtype,
        file_format=options.file_format,
        compression=options.compression,
        experts=options.experts,
        recovery=options.recovery,
        progress=progress,
    )


def convert_with_recovery(
    src: Path,
    dst: Path,
    *,
    to: str | None = "mla",
    dtype: str = "auto",
    file_format: str = "auto",
    compression: CompressionOptions | None,
    experts: int | None = None,
    recovery: RecoveryOptions,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert the model at `src` to a smaller KV cache, as the folder `dst`. Optionally train it on
    `recovery.texts` to recover its quality, and evaluate it on `recovery.evaluate`.

    Other arguments are those of `convert`. Recovery training distils the original model into the
    compressed one (`train.run.distill`). `dst` appears complete or not at all; its conversion.json
    has all figures. After an interruption the same call resumes.

    Raises UserError as `convert` and `distill`, for unsuitable texts, and for evaluation text that
    is part of the others. Raises KeyboardInterrupt, after a checkpoint, if SIGINT or SIGTERM stops
    the training.
    """
    started = time.perf_counter()
    dst = dst.absolute()
    remove_finished_work_folder(dst)
    options = ConversionOptions(
        to=to,
        dtype=dtype,
        file_format=file_format,
        compression=compression,
        experts=experts,
        recovery=recovery,
    )
    conversion = prepare_conversion(src, dst, options)
    inputs = prepare_recovery(conversion)
    progress = progress or SilentProgress()
    with open_work_folder(dst, inputs.fingerprint()) as work:
        inputs = with_calibration(inputs, work, progress)
        result, report = _convert(inputs, work, progress)
        source = open_checkpoint(result)
        converted = resolve_mtp_modules(read_config(source), source)
        work.place(result, report_files(report), dst)
    return measure(src, dst, conversion.config, converted, time.perf_counter() - started)


def _convert(
    inputs: RecoveryInputs, work: WorkFolder, progress: Progress
) -> tuple[Path, dict[str, Any]]:
    """The finished model in the work folder, and its report."""
    conversion, text = inputs.conversion, inputs.evaluation_text
    distillation, experts = inputs.distillation, conversion.options.experts
    evaluation: dict[str, Any] = {}

    def score(name: str, model: Path) -> None:
        if text is not None:
            evaluation[name] = work.cached(name, partial(evaluate, model, text, progress))

    score("original", conversion.src)
    if not work.start.exists():
        # a model to train is rounded and upcycled only after training
        convert(
            conversion.src,
            work.start,
            to="mla",
            dtype=conversion.options.dtype if distillation is None else "fp32",
            compression=inputs.compression,
            experts=experts if distillation is None else None,
            progress=progress,
        )
    report = json.loads((work.start / REPORT_FILE).read_text(encoding="utf-8"))
    dtype = report["dtype"] = conversion.stored_dtype()
    if experts is not None:
        report["routed_experts"] = experts
    score("compressed", work.start)
    result = work.start
    if distillation is not None:
        report["recovery"] = work.cached(
            "recovery", lambda: _train(inputs, distillation, work, progress)
        )
        result = work.out
        if not result.exists():
            convert(work.recovered, result, dtype=dtype, experts=experts, progress=progress)
        score("recovered", result)
    if text is not None:
        report["evaluation"] = {"text": str(text.path), **evaluation}
    return result, report


def _train(
    inputs: RecoveryInputs,
    distillation: DistillationOptions,
    work: WorkFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Recovery training: writes `work.recovered`, returns the object `recovery` of the report."""
    teacher = inputs.conversion.src
    found = distill(
        work.start,
        teacher,
        work.tokens,
        work.run,
        distillation,
        quiet=not progress.shown,
        progress=progress,
    )
    if not work.recovered.exists():
        write_recovered(work.run, work.start, work.recovered, progress)
    folder = TokenizedDataset.open(work.tokens)
    recipe = distillation_recipe(work.start, teacher, work.tokens, distillation)
    phase = recipe["phase"][-1]
    settings = asdict(distillation) | {
        "batch_tokens": phase["batch_size"] * phase["sequence_length"],
        "learning_rate": phase["learning_rate"][0]["to"],
    }
    return {
        "text": list(inputs.recovery.texts),
        "text_tokens": folder.num_tokens("train"),
        "held_out_tokens": folder.num_tokens("held_out"),
        "settings": settings,
        "tokens": found.tokens,
        "seconds": found.seconds,
        "tokens_per_second": found.tokens / found.seconds,
        "divergence_before": found.before.divergence,
        "divergence_after": found.after.divergence,
        "loss_before": found.before.loss,
        "loss_after": found.after.loss,
        "evaluations": [
            {"tokens": each.tokens, "loss": each.loss, "divergence": each.divergence}
            for each in found.evaluations
        ],
    }
