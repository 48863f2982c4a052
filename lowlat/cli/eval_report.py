"""Perplexity measurement of `lowlat eval`, and its result as text or JSON."""

import time
from dataclasses import dataclass
from typing import Any

from lowlat.engine.scoring import Score
from lowlat.generate.model import Model
from lowlat.utils.progress import make_progress
from lowlat.utils.strict_json import finite


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A score, its model and its text."""

    model: str
    text: str
    score: Score
    seconds: float


def measure(model: Model, origin: str, content: str, window: int | None) -> Evaluation:
    """Perplexity of `content`, with progress on stderr."""
    started = time.perf_counter()
    score = model.perplexity(content, window=window, progress=make_progress())
    return Evaluation(
        model=model.name,
        text=origin,
        score=score,
        seconds=time.perf_counter() - started,
    )


def as_dict(result: Evaluation) -> dict[str, Any]:
    """The object of --json; null for a number that is not finite."""
    score = result.score
    return {
        "model": result.model,
        "text": result.text,
        "window": score.window,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "perplexity": finite(score.perplexity),
        "bits_per_byte": finite(score.bits_per_byte),
        "seconds": result.seconds,
    }


def print_text(result: Evaluation) -> None:
    score = result.score
    print(f"{result.model} on {result.text}, windows of {score.window} tokens")
    print(f"perplexity     {score.perplexity:.4f}")
    print(f"bits per byte  {score.bits_per_byte:.4f}")
    print(
        f"predicted      {score.tokens:,} tokens, {score.bytes:,} bytes "
        f"in {result.seconds:.1f} s ({score.tokens / result.seconds:,.0f} tokens/s)"
    )
