"""Perplexities of the models of a conversion on one text, as `lowlat eval` measures them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from lowlat import api
from lowlat.data.overlap import LENGTH
from lowlat.text.pieces import encode_plain
from lowlat.text.plain import read_plain_text
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationText:
    """What models are evaluated on."""

    path: Path
    """Its file."""
    content: str
    """All of it."""
    ids: Int[np.ndarray, " tokens"]
    """By the tokenizer of the models."""


def read_evaluation_text(path: Path, tokenizer: Tokenizer) -> EvaluationText:
    """The text in the file `path`. Raises UserError where it is none, or too short to be found in
    other text.
    """
    content = read_plain_text(path, "--evaluate")
    # as token folders have them
    ids = encode_plain(tokenizer, content).astype(np.int64)
    if len(ids) < LENGTH:
        raise UserError(
            f"--evaluate {path}: {len(ids)} tokens are too few, at least {LENGTH} are needed"
        )
    return EvaluationText(path=path, content=content, ids=ids)


def evaluate(model: Path, text: EvaluationText, progress: Progress) -> dict[str, Any]:
    """How well the checkpoint `model` predicts `text`, computed in bf16: perplexity, bits per byte,
    tokens predicted, and tokens of a window. Raises UserError where that is no number.
    """
    # A native model takes all threads from PyTorch, which the training that follows needs.
    threads = torch.get_num_threads()
    try:
        loaded = api.load(str(model.absolute()), progress=progress)
        score = loaded.perplexity(text.content, progress=progress)
    finally:
        torch.set_num_threads(threads)
    if not math.isfinite(score.perplexity):
        raise UserError(
            f"--evaluate {text.path}: no perplexity comes out of {model}, its loss is "
            f"{score.nll / score.tokens:.4g} nats a token; check its weights"
        )
    return {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "window": score.window,
    }
