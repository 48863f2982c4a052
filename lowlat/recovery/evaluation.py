"""Perplexity of a conversion's models on an evaluation text, measured as by `lowlat eval`."""

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
    """A text to evaluate models on."""

    path: Path
    content: str
    ids: Int[np.ndarray, " tokens"]
    """Token ids by the models' tokenizer."""


def read_evaluation_text(path: Path, tokenizer: Tokenizer) -> EvaluationText:
    """Read the text file `path`. Raises UserError if it is not text, or too short to detect overlap
    with training text.
    """
    content = read_plain_text(path, "--evaluate")
    # encoded as in tokenized datasets
    ids = encode_plain(tokenizer, content).astype(np.int64)
    if len(ids) < LENGTH:
        raise UserError(
            f"--evaluate {path}: {len(ids)} tokens are too few, at least {LENGTH} are needed"
        )
    return EvaluationText(path=path, content=content, ids=ids)


def evaluate(model: Path, text: EvaluationText, progress: Progress) -> dict[str, Any]:
    """Perplexity, bits per byte, number of tokens and window length of the checkpoint `model` on
    `text`, computed in bf16. Raises UserError if the perplexity is not finite.

    `api.load` sets PyTorch to one thread for the whole process; this is undone for the training.
    """
    threads = torch.get_num_threads()
    try:
        loaded = api.load(str(model.absolute()), progress=progress)
        score = loaded.perplexity(text.content, progress=progress)
    finally:
        torch.set_num_threads(threads)
    if not math.isfinite(score.perplexity):
        raise UserError(
            f"--evaluate {text.path}: the perplexity of {model} is not finite, its loss is "
            f"{score.nll / score.tokens:.4g} nats per token; check its weights"
        )
    return {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "window": score.window,
    }
