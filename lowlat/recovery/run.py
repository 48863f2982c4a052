"""A conversion to a smaller cache with healing, evaluation, or both, from start to end.

Owns the order of things and the report; steps are `convert`'s and `train`'s, places `heal.work`'s.
What would fail is found first: options, texts, and whether they hold the evaluation text.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.checkpoint.mapping import resolve_mtp_modules
from lowlat.checkpoint.save import text_files, write_checkpoint
from lowlat.config.model import ModelConfig
from lowlat.convert.calibration import calibration_of, read_calibration
from lowlat.convert.compression import Compression
from lowlat.convert.exact import check_exact
from lowlat.convert.planning import likely_config
from lowlat.convert.report import REPORT_FILE, Report, measure, report_files
from lowlat.convert.run import Job, check, convert
from lowlat.data.dataset import TokenizedDataset
from lowlat.recovery.evaluation import EvaluationText, evaluate, read_evaluation_text
from lowlat.recovery.text import build_tokens, require_uncalibrated, require_unseen
from lowlat.recovery.wanted import Wanted, check_wanted, identity
from lowlat.recovery.work import Work, clear_placed, opened
from lowlat.text.pieces import encode_plain
from lowlat.text.plain import read_plain_text
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.run.export import export_save
from lowlat.train.run.recovery import (
    SEQUENCE_LENGTH,
    RecoveryOptions,
    check_recovery_data,
    check_recovery_memory,
    recovery_recipe,
    train_recovery,
)
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

ATTENTION = ".self_attn."
"""In the name of every tensor that healing trains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """A conversion that can begin, and what it works with."""

    job: Job
    compression: Compression
    wanted: Wanted
    healing: RecoveryOptions | None
    tokenizer: Tokenizer
    text: EvaluationText | None
    work: Work
    progress: Progress


def convert_and_heal(
    src: Path,
    dst: Path,
    *,
    to: str | None = "mla",
    dtype: str = "auto",
    file_format: str = "auto",
    compression: Compression | None,
    experts: int | None = None,
    wanted: Wanted,
    progress: Progress | None = None,
) -> Report:
    """Write the model at `src` with a smaller cache as the folder `dst`, healed on
    `wanted.texts` and measured on `wanted.evaluate`, as far as these are given.

    Other arguments are those of `convert`. Recovery training distils the original into the
    compressed model (`train.run.recovery`). `dst` appears complete or not at all, with all that was
    measured in its conversion.json; the same call resumes what an interrupted one left.
    Raises UserError as `convert`, for texts that are none, too short or in both places, and as
    `train_recovery`; KeyboardInterrupt after a save where the training was asked to stop by SIGINT
    or SIGTERM.
    """
    began = time.perf_counter()
    dst = dst.absolute()
    clear_placed(dst)
    check_wanted(wanted, compression)
    job = check(
        src,
        dst,
        to=to,
        dtype=dtype,
        file_format=file_format,
        compression=compression,
        experts=experts,
    )
    assert compression is not None and not wanted.is_plain
    tokenizer = Tokenizer.from_folder(src) if src.is_dir() else Tokenizer.from_gguf(src)
    healing = _healing(wanted, job.found)
    if healing is not None:
        share, layout = compression.share, compression.layout
        likely = likely_config(job.found, check_exact(job.found), share, layout)
        check_recovery_memory(job.found, likely, healing)
    text = wanted.evaluate and read_evaluation_text(wanted.evaluate, tokenizer)
    facts = identity(job, wanted, None if text is None else text.content)
    with opened(dst, facts) as work:
        task = _Task(
            job=job,
            compression=compression,
            wanted=wanted,
            healing=healing,
            tokenizer=tokenizer,
            text=text,
            work=work,
            progress=progress or SilentProgress(),
        )
        task = _with_fit_text(task)
        made, report = _made(task)
        converted = _config(made)
        work.place(made, report_files(report), dst)
    return measure(src, dst, job.found, converted, time.perf_counter() - began)


def _healing(wanted: Wanted, config: ModelConfig) -> RecoveryOptions | None:
    if wanted.tokens is None:
        return None
    length = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    if wanted.tokens < length:
        raise UserError(f"--heal {wanted.tokens}: is less than a row of {length} tokens; give more")
    return RecoveryOptions(tokens=wanted.tokens, sequence_length=length)


def _with_fit_text(task: _Task) -> _Task:
    """`task` with what it is calibrated on; all of its text is found fit."""
    if task.compression.calibrate:
        _check_calibration(task)  # a wrong file is told before all of --text is read
        _checked_tokens(task)
        return task
    task = replace(task, compression=_calibrated(task, _checked_tokens(task)))
    _check_calibration(task)
    return task


def _checked_tokens(task: _Task) -> TokenizedDataset | None:
    """The text to heal on as tokens, found fit before anything that takes long; None without
    healing.
    """
    work, text, progress = task.work, task.text, task.progress
    if task.healing is None:
        return None
    if work.tokens.exists():
        folder = TokenizedDataset.open(work.tokens)
    else:
        length = task.healing.sequence_length
        folder = build_tokens(work.tokens, task.wanted.texts, task.tokenizer, length, progress)
    check_recovery_data(work.tokens, task.healing, origin=f"--text {', '.join(task.wanted.texts)}")
    ids = task.job.found.vocab_size
    if folder.vocab_size > ids:
        raise UserError(
            f"{task.job.src}: its tokenizer has ids up to {folder.vocab_size - 1}, its model only "
            f"{ids} of them; restore tokenizer.json"
        )
    if text is not None:
        require_unseen(folder, text.ids, text.path, progress)
    return folder


def _calibrated(task: _Task, folder: TokenizedDataset | None) -> Compression:
    """The compression that is asked for, calibrated on the text to heal on, which `folder` holds,
    unless that one is too short.
    """
    compression, context = task.compression, task.job.found.max_position_embeddings
    if folder is None:
        return compression
    tokens, count = partial(folder.tokens, "train"), folder.num_tokens("train")
    own = calibration_of(tokens, count, context, "the text of --text")
    return replace(compression, calibration=own)


def _check_calibration(task: _Task) -> None:
    """Raises UserError for unfit text to calibrate on, before anything that takes long."""
    paths, text = task.compression.calibrate, task.text
    if task.work.start.exists() or task.compression.calibration is not None:
        return
    found = read_calibration(paths, task.tokenizer, task.job.found.max_position_embeddings)
    if text is not None:
        texts = (read_plain_text(path, "--calibrate") for path in paths)
        given = (encode_plain(task.tokenizer, each).astype(np.int64) for each in texts)
        seen = given if paths else found.windows.numpy()
        origin = "the text of --calibrate" if paths else "lowlat's own calibration text"
        require_uncalibrated(seen, text.ids, text.path, origin)


def _made(task: _Task) -> tuple[Path, dict[str, Any]]:
    """The finished model in the work's folder, and its report."""
    work, job = task.work, task.job
    # what is trained is rounded once, when it is done, and its experts are made then
    dtype, experts = (job.dtype, job.experts) if task.healing is None else ("fp32", None)
    scores = {"original": _score(task, "original", job.src)}
    if not work.start.exists():
        convert(
            job.src,
            work.start,
            to="mla",
            dtype=dtype,
            compression=task.compression,
            experts=experts,
            progress=task.progress,
        )
    report = json.loads((work.start / REPORT_FILE).read_text(encoding="utf-8"))
    report["dtype"] = job.stored_dtype()
    if job.experts is not None:
        report["routed_experts"] = job.experts
    scores["compressed"] = _score(task, "compressed", work.start)
    if task.healing is None:
        return work.start, report | _evaluation(task, scores)
    report["healing"] = work.kept("healing", lambda: _heal(task))
    if not work.out.exists():
        convert(
            work.healed,
            work.out,
            dtype=job.stored_dtype(),
            experts=job.experts,
            progress=task.progress,
        )
    scores["healed"] = _score(task, "healed", work.out)
    return work.out, report | _evaluation(task, scores)


def _heal(task: _Task) -> dict[str, Any]:
    """Train; the part of the report that tells of it."""
    work, healing = task.work, task.healing
    assert healing is not None
    found = train_recovery(
        work.start,
        task.job.src,
        work.tokens,
        work.run,
        healing,
        quiet=not task.progress.shown,
        progress=task.progress,
    )
    if not work.healed.exists():
        _write_healed(task)
    folder = TokenizedDataset.open(work.tokens)
    phase = recovery_recipe(work.start, task.job.src, work.tokens, healing)["phase"][-1]
    settings = asdict(healing) | {
        "batch_tokens": phase["batch_size"] * phase["sequence_length"],
        "learning_rate": phase["learning_rate"][0]["to"],
    }
    return {
        "text": list(task.wanted.texts),
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


def _write_healed(task: _Task) -> None:
    """The start with the attention that was trained, in fp32: the trainer may hold what it does not
    train in fewer bits.
    """
    work = task.work
    shutil.rmtree(work.trained, ignore_errors=True)
    export_save(work.run, work.trained, step=None, dtype="fp32", progress=task.progress)
    start, trained = open_checkpoint(work.start), open_checkpoint(work.trained)
    sides = ((name, trained if ATTENTION in name else start) for name in start.names())
    tensors = ((name, side.read(name)) for name, side in sides)
    write_checkpoint(work.healed, start.hf_config, tensors, extra_files=text_files(work.start))
    shutil.rmtree(work.trained)


def _score(task: _Task, name: str, model: Path) -> dict[str, Any] | None:
    text = task.text
    if text is None:
        return None
    return task.work.kept(name, lambda: evaluate(model, text, task.progress))


def _evaluation(task: _Task, scores: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    if task.text is None:
        return {}
    return {"evaluation": {"text": str(task.text.path), **scores}}


def _config(folder: Path) -> ModelConfig:
    source = open_checkpoint(folder)
    return resolve_mtp_modules(read_config(source), source)
