"""Conversion of an MLA model to DeepSeek Sparse Attention (`--to dsa`): indexers initialised from
the model's attention, distilled in a dense warm-up, then optionally trained with the model.

An interrupted call resumes from intermediate results in the work folder. GQA models are first
converted to MLA exactly.
"""

import hashlib
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.attention import sparse_topk
from lowlat.config.model import GQAConfig, ModelConfig
from lowlat.convert.conversion import Conversion, prepare_conversion
from lowlat.convert.options import ConversionOptions, RecoveryOptions
from lowlat.convert.parameters.exact_mla import mla_config
from lowlat.convert.parameters.indexer import (
    IndexerOptions,
    init_indexer,
    measure_inputs,
    sparse_config,
)
from lowlat.convert.report import REPORT_FILE, ConversionReport, measure, report_bytes
from lowlat.convert.run import convert
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.overlap import shared_runs
from lowlat.model.mla import MLA
from lowlat.model.transformer import Transformer
from lowlat.recovery.evaluation import read_evaluation_text
from lowlat.recovery.sparse_evaluation import SparseEvaluation, evaluate_sparse, plan_evaluation
from lowlat.recovery.trained_attention import write_recovered
from lowlat.recovery.training_text import build_tokens, require_disjoint, text_fingerprint
from lowlat.recovery.work_folder import (
    WorkFolder,
    open_work_folder,
    remove_finished_work_folder,
)
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.metrics.summary import summarise
from lowlat.train.run.distill import (
    DistillationOptions,
    check_distillation,
    check_memory,
    distill,
    run_recipe,
    schedule,
)
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

SEQUENCE_LENGTH = 2048
"""Tokens of a sequence of the warm-up, at least twice index_topk, at most the context."""
LEARNING_RATE = 1e-3
"""Peak of the warm-up, that of DeepSeek-V3.2."""
MEASURED_WINDOWS, MEASURED_LENGTH = 16, 1024
"""Windows of training text that the initial indexers are fitted on."""


def convert_to_sparse(
    src: Path,
    dst: Path,
    *,
    dtype: str = "auto",
    indexer: IndexerOptions,
    recovery: RecoveryOptions,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert the model at `src` to sparse attention, as the folder `dst`: indexers are distilled
    on `recovery.texts`, with `recovery.tokens` the attention is then trained with them to match the
    dense model, and the written model is evaluated on `recovery.evaluate`. conversion.json has all
    figures.

    Raises UserError and KeyboardInterrupt as `recovery.run.convert_with_recovery`.
    """
    started = time.perf_counter()
    dst = dst.absolute()
    remove_finished_work_folder(dst)
    options = ConversionOptions(to="dsa", dtype=dtype, indexer=indexer, recovery=recovery)
    conversion = prepare_conversion(src, dst, options)
    dense_config = _dense_config(conversion)
    config, reason = sparse_config(dense_config, indexer)
    length = _sequence_length(config)
    _check_training(dense_config, config, options, length)
    tokenizer = Tokenizer.from_folder(src) if src.is_dir() else Tokenizer.from_gguf(src)
    plan = _evaluation(recovery.evaluate, config, tokenizer)
    progress = progress or SilentProgress()
    with open_work_folder(dst, _fingerprint(conversion, plan)) as work:
        _training_text(conversion, work, tokenizer, length, plan, progress)
        dense = _dense_model(conversion, work, progress)
        _start(dense, config, work, progress)
        report: dict[str, Any] = {
            "to": "dsa",
            "model_type": config.model_type,
            "model_type_reason": reason,
            "dtype": conversion.stored_dtype(),
            "indexer": asdict(indexer) | {"index_topk": _topk(config)},
        }
        report["warmup"] = work.cached("warmup", partial(_warm_up, work, indexer, length, progress))
        result = work.recovered
        if not result.exists():
            write_recovered(work.run, work.start, result, progress)
        if recovery.tokens is not None:
            report["recovery"] = work.cached(
                "recovery", partial(_recover, work, dense, recovery, length, progress)
            )
            if not work.sparse.exists():
                write_recovered(work.sparse_run, result, work.sparse, progress)
            result = work.sparse
        if not work.out.exists():
            convert(result, work.out, dtype=report["dtype"], progress=progress)
        if plan is not None:
            report["evaluation"] = work.cached(
                "evaluation", partial(evaluate_sparse, plan, work.start, work.out, progress)
            )
        work.place(work.out, {REPORT_FILE: report_bytes(report)}, dst)
    seconds = time.perf_counter() - started
    return measure(src, dst, conversion.config, config, seconds)


def _check_training(
    dense: ModelConfig, config: ModelConfig, options: ConversionOptions, length: int
) -> None:
    """Raises UserError for too few tokens to train on, and for too little memory for --heal. The
    trainer itself checks the memory of the warm-up before it starts.
    """
    counts = {"--warmup": options.indexer.warmup, "--heal": options.recovery.tokens}
    for option, count in counts.items():
        if count is not None and count < length:
            raise UserError(
                f"{option} {count}: is less than a sequence of {length} tokens; give more"
            )
    if options.recovery.tokens is not None:
        check_memory(dense, config, _distillation_options(options.recovery, length))


def _distillation_options(recovery: RecoveryOptions, length: int) -> DistillationOptions:
    assert recovery.tokens is not None
    return DistillationOptions(tokens=recovery.tokens, sequence_length=length, batch_tokens=length)


def _evaluation(
    path: Path | None, config: ModelConfig, tokenizer: Tokenizer
) -> SparseEvaluation | None:
    if path is None:
        return None
    return plan_evaluation(read_evaluation_text(path, tokenizer), config, tokenizer)


def _dense_config(conversion: Conversion) -> ModelConfig:
    """The config of the dense MLA model, without storage fields."""
    config = replace(conversion.config, quantization=None, packing=None, mtp_copies=False)
    return mla_config(config) if isinstance(config.attention, GQAConfig) else config


def _sequence_length(config: ModelConfig) -> int:
    return min(max(SEQUENCE_LENGTH, 2 * _topk(config)), config.max_position_embeddings)


def _topk(config: ModelConfig) -> int:
    topk = sparse_topk(config.attention)
    assert topk is not None
    return topk


def _fingerprint(conversion: Conversion, plan: SparseEvaluation | None) -> dict[str, str]:
    recovery, evaluated = conversion.options.recovery, "none"
    if plan is not None:
        digest = hashlib.sha256(plan.text.content.encode()).hexdigest()[:12]
        evaluated = f"{plan.text.path} {digest}"
    return conversion.fingerprint() | {
        "indexer": ", ".join(f"{k} {v}" for k, v in asdict(conversion.options.indexer).items()),
        "recovery": "none" if recovery.tokens is None else f"{recovery.tokens} tokens",
        "training text": ", ".join(text_fingerprint(each) for each in recovery.texts),
        "evaluation text": evaluated,
    }


def _training_text(
    conversion: Conversion,
    work: WorkFolder,
    tokenizer: Tokenizer,
    length: int,
    plan: SparseEvaluation | None,
    progress: Progress,
) -> None:
    """Build `work.tokens`, and check that it suits the training and holds no evaluation text."""
    recovery = conversion.options.recovery
    texts = recovery.texts
    if not work.tokens.exists():
        build_tokens(work.tokens, texts, tokenizer, length, progress)
    folder = TokenizedDataset.open(work.tokens)
    if folder.vocab_size > conversion.config.vocab_size:
        raise UserError(
            f"{conversion.src}: its tokenizer has ids up to {folder.vocab_size - 1}, but the model "
            f"has {conversion.config.vocab_size} tokens; restore tokenizer.json"
        )
    if recovery.tokens is not None:
        distillation = _distillation_options(recovery, length)
        check_distillation(work.tokens, distillation, origin=f"--text {', '.join(texts)}")
    if plan is not None:
        share = shared_runs(folder, plan.text.ids, progress=progress)
        require_disjoint(share, plan.text.path, "the text of --text")


def _dense_model(conversion: Conversion, work: WorkFolder, progress: Progress) -> Path:
    """The source, if it has MLA, else its exact conversion."""
    if not isinstance(conversion.config.attention, GQAConfig):
        return conversion.src
    if not work.dense.exists():
        convert(conversion.src, work.dense, to="mla", progress=progress)
    return work.dense


@torch.no_grad()
def _start(dense: Path, config: ModelConfig, work: WorkFolder, progress: Progress) -> None:
    """Write `work.start`: the dense model with initialised indexers, in fp32."""
    if work.start.exists():
        return
    loaded = load_model(dense, dtype="fp32", progress=progress).model.requires_grad_(False)
    folder = TokenizedDataset.open(work.tokens)
    length = min(MEASURED_LENGTH, config.max_position_embeddings)
    count = max(1, min(MEASURED_WINDOWS, folder.num_tokens("train") // length))
    positions = np.arange(min(count * length, folder.num_tokens("train")))
    ids = torch.from_numpy(folder.tokens("train", positions)).view(-1, length)
    inputs = measure_inputs(loaded, ids, dtype=torch.bfloat16)
    model = Transformer(config).requires_grad_(False)
    missing = model.load_state_dict(loaded.state_dict(), strict=False, assign=True)
    assert all(".indexer." in name for name in missing.missing_keys)
    layers = [module for module in model.modules() if isinstance(module, MLA)]
    for layer in layers:
        assert layer.indexer is not None
        init_indexer(layer.indexer, layer, inputs[layer.layer], seed=layer.layer)
    save_model(model, config, work.start, source=dense)


def _warm_up(
    work: WorkFolder, options: IndexerOptions, length: int, progress: Progress
) -> dict[str, Any]:
    """Distil the indexers in `work.run`; returns the object `warmup` of the report."""
    raw = warmup_recipe(work.start, work.tokens, options.warmup, length)
    _, history = run_recipe(raw, work.run, work.start, quiet=not progress.shown, progress=progress)
    summary = summarise(history)
    return {
        "tokens": summary["tokens"],
        "sequence_length": length,
        "seconds": summary["seconds"],
        "tokens_per_second": summary["tokens_per_second_overall"],
        "layers": summary["indexers"],
    }


def warmup_recipe(start: Path, tokens: Path, count: int, length: int) -> dict[str, Any]:
    """The raw recipe of the dense warm-up on `count` tokens, with absolute paths."""
    steps = max(1, round(count / length))
    return {
        "name": "indexer",
        "base_model": str(start.absolute()),
        "precision": "bf16",
        "data": {"folder": str(tokens.absolute())},
        "optimizer": {"weight_decay": 0.0},
        "phase": [
            {
                "name": "warm-up",
                "dsa_stage": "warmup",
                "steps": steps,
                "sequence_length": length,
                "batch_size": 1,
                "micro_batch_size": 1,
                "learning_rate": schedule(LEARNING_RATE, steps),
                "bias_update_speed": 0.0,
            }
        ],
        "checkpoints": {"every_steps": max(1, min(50, steps // 4))},
        "evaluation": {"every_steps": steps, "sequences": 1},
    }


def _recover(
    work: WorkFolder, dense: Path, recovery: RecoveryOptions, length: int, progress: Progress
) -> dict[str, Any]:
    """Sparse training of attention and indexers to match the dense model, in `work.sparse_run`."""
    found = distill(
        work.recovered,
        dense,
        work.tokens,
        work.sparse_run,
        _distillation_options(recovery, length),
        quiet=not progress.shown,
        progress=progress,
    )
    return {
        "tokens": found.tokens,
        "seconds": found.seconds,
        "divergence_before": found.before.divergence,
        "divergence_after": found.after.divergence,
        "loss_before": found.before.loss,
        "loss_after": found.after.loss,
    }
