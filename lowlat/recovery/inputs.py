"""Validated inputs of recovery training: training, calibration and evaluation text.

Checks that need no training run here, before hours of work: too little text, too little memory,
and evaluation text that is part of the other texts (contamination).
"""

import hashlib
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lowlat.config.model import ModelConfig
from lowlat.convert.compression.calibration import calibration_from_tokens, read_calibration
from lowlat.convert.compression.plan import estimated_config
from lowlat.convert.conversion import Conversion
from lowlat.convert.options import CompressionOptions, RecoveryOptions
from lowlat.convert.parameters.exact_mla import check_exact
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.overlap import share_seen, shared_runs
from lowlat.recovery.evaluation import EvaluationText, read_evaluation_text
from lowlat.recovery.training_text import build_tokens, require_disjoint, text_fingerprint
from lowlat.recovery.work_folder import WorkFolder
from lowlat.text.pieces import encode_plain
from lowlat.text.plain import read_plain_text
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.run.distill import (
    SEQUENCE_LENGTH,
    DistillationOptions,
    check_distillation,
    check_memory,
)
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryInputs:
    """A conversion with recovery training, evaluation, or both."""

    conversion: Conversion
    compression: CompressionOptions
    distillation: DistillationOptions | None
    """Options of the recovery training; None for evaluation only."""
    tokenizer: Tokenizer
    evaluation_text: EvaluationText | None

    @property
    def recovery(self) -> RecoveryOptions:
        """Options of recovery training and evaluation."""
        return self.conversion.options.recovery

    def fingerprint(self) -> dict[str, str]:
        """Source, options and texts, by name; the work folder is resumed only if all match."""
        recovery, text = self.recovery, self.evaluation_text
        facts = self.conversion.fingerprint()
        facts["recovery"] = "none" if recovery.tokens is None else f"{recovery.tokens} tokens"
        texts = ", ".join(text_fingerprint(each) for each in recovery.texts)
        facts["training text"] = texts or "none"
        facts["evaluation text"] = "none"
        if text is not None:
            digest = hashlib.sha256(text.content.encode()).hexdigest()[:12]
            facts["evaluation text"] = f"{text.path} {digest}"
        return facts


def prepare_recovery(conversion: Conversion) -> RecoveryInputs:
    """Check memory and read the evaluation text. Raises UserError if one of them is unsuitable."""
    options, src = conversion.options, conversion.src
    compression = options.compression
    assert compression is not None and not options.recovery.is_empty
    tokenizer = Tokenizer.from_folder(src) if src.is_dir() else Tokenizer.from_gguf(src)
    config = conversion.config
    distillation = _distillation_options(options.recovery, config)
    if distillation is not None:
        student = estimated_config(
            config, check_exact(config), compression.share, compression.layout
        )
        check_memory(config, student, distillation)
    path = options.recovery.evaluate
    return RecoveryInputs(
        conversion=conversion,
        compression=compression,
        distillation=distillation,
        tokenizer=tokenizer,
        evaluation_text=None if path is None else read_evaluation_text(path, tokenizer),
    )


def with_calibration(
    inputs: RecoveryInputs, work: WorkFolder, progress: Progress
) -> RecoveryInputs:
    """`inputs` with the calibration text. Builds and checks all texts.

    Without `--calibrate` the calibration text is the training text, unless that is too short.
    """
    if inputs.compression.calibrate:
        _check_calibration(inputs, work)  # first, because reading all of --text takes longer
        _training_tokens(inputs, work, progress)
        return inputs
    folder = _training_tokens(inputs, work, progress)
    if folder is not None:
        tokens, count = partial(folder.tokens, "train"), folder.num_tokens("train")
        context = inputs.conversion.config.max_position_embeddings
        calibration = calibration_from_tokens(tokens, count, context, "the text of --text")
        inputs = replace(inputs, compression=replace(inputs.compression, calibration=calibration))
    _check_calibration(inputs, work)
    return inputs


def _distillation_options(
    recovery: RecoveryOptions, config: ModelConfig
) -> DistillationOptions | None:
    if recovery.tokens is None:
        return None
    length = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    if recovery.tokens < length:
        raise UserError(
            f"--heal {recovery.tokens}: is less than a sequence of {length} tokens; give more"
        )
    return DistillationOptions(tokens=recovery.tokens, sequence_length=length)


def _training_tokens(
    inputs: RecoveryInputs, work: WorkFolder, progress: Progress
) -> TokenizedDataset | None:
    """The training text as a checked dataset; None without recovery training."""
    distillation, texts = inputs.distillation, inputs.recovery.texts
    if distillation is None:
        return None
    if work.tokens.exists():
        folder = TokenizedDataset.open(work.tokens)
    else:
        length = distillation.sequence_length
        folder = build_tokens(work.tokens, texts, inputs.tokenizer, length, progress)
    check_distillation(work.tokens, distillation, origin=f"--text {', '.join(texts)}")
    vocab_size = inputs.conversion.config.vocab_size
    if folder.vocab_size > vocab_size:
        raise UserError(
            f"{inputs.conversion.src}: its tokenizer has ids up to {folder.vocab_size - 1}, but "
            f"the model has {vocab_size} tokens; restore tokenizer.json"
        )
    text = inputs.evaluation_text
    if text is not None:
        share = shared_runs(folder, text.ids, progress=progress)
        require_disjoint(share, text.path, "the text of --text")
    return folder


def _check_calibration(inputs: RecoveryInputs, work: WorkFolder) -> None:
    """Raises UserError for calibration text that is unsuitable or contains the evaluation text."""
    paths, text = inputs.compression.calibrate, inputs.evaluation_text
    if work.start.exists() or inputs.compression.calibration is not None:
        return
    context = inputs.conversion.config.max_position_embeddings
    found = read_calibration(paths, inputs.tokenizer, context)
    if text is not None:
        texts = (read_plain_text(path, "--calibrate") for path in paths)
        ids = (encode_plain(inputs.tokenizer, each).astype(np.int64) for each in texts)
        calibration = ids if paths else found.windows.numpy()
        origin = "the text of --calibrate" if paths else "lowlat's own calibration text"
        require_disjoint(share_seen(text.ids, calibration), text.path, origin)
