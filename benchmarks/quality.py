"""Quality by data type of weights and KV cache: perplexity and KL divergence from fp32.

    python benchmarks/quality.py TEXT [--bytes 100000] [--models default smollm2-135m]
        [--forms prompt step] [--out FOLDER]

For each model and each pair of weights (bf16, int8, int4) and KV cache (bf16, int8): the perplexity
of the first bytes of TEXT in windows of 1024 tokens, its increase over fp32, the mean KL divergence
from fp32's next-token distribution in nats, and top-1 agreement. Two arithmetic paths are measured:
prefill, a whole window at once, and decode, in steps of 32 tokens, whose results are bitwise equal
to single-token steps.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import results_file
import torch
from torch import Tensor

import lowlat
from lowlat.attention.path import DECODE_TOKENS
from lowlat.engine import scoring
from lowlat.generate.model import Model

WEIGHTS = ("bf16", "int8", "int4")
CACHES = ("bf16", "int8")
WINDOW = 1024
FORMS = {"prompt": WINDOW, "step": DECODE_TOKENS}
"""Tokens per step."""


@dataclass
class Quality:
    """Sums over tokens for one model and one pair of data types."""

    model: str
    weights: str
    cache: str
    form: str
    tokens: int = 0
    nll: float = 0.0
    """Negative log-likelihood in nats."""
    divergence: float = 0.0
    """KL divergence from fp32 in nats."""
    same: int = 0
    """Tokens with the same top-1 prediction as fp32."""

    def add(self, logits: Tensor, exact: Tensor, ids: Tensor) -> None:
        """Add a window: `logits` and fp32's log-probabilities of all tokens but the last."""
        predicted = logits.log_softmax(dim=-1)
        self.tokens += len(ids)
        self.nll -= float(predicted.gather(1, ids[:, None]).sum(dtype=torch.float64))
        self.divergence += float((exact.exp() * (exact - predicted)).sum(dtype=torch.float64))
        self.same += int((predicted.argmax(dim=-1) == exact.argmax(dim=-1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)


def measure(name: str, text: str, forms: Sequence[str]) -> list[Quality]:
    """All pairs on the model `name` in all forms, fp32 first."""
    exact = lowlat.load(name, dtype="fp32")
    models = variants(name)
    results = [Quality(name, "fp32", "fp32", "prompt")]
    results += [Quality(name, *pair, form) for form in forms for pair, _ in models]
    ids = exact.tokenizer.encode(text)
    for start in range(0, len(ids), WINDOW):
        window = ids[start : start + WINDOW]
        if len(window) < 2:
            break
        print(f"{name}: token {start:,} of {len(ids):,}", flush=True)
        following = torch.tensor(window[1:])
        logits = exact.logits(window)[:-1]
        reference = logits.log_softmax(dim=-1)
        results[0].add(logits, reference, following)
        runs = [(form, model) for form in forms for _, model in models]
        for result, (form, model) in zip(results[1:], runs, strict=True):
            found = scoring.logits(model.runner, window, chunk=FORMS[form])
            result.add(found[:-1], reference, following)
    return results


def variants(name: str) -> list[tuple[tuple[str, str], Model]]:
    """All models by (weights, cache); models that differ only in the cache share weights."""
    result = []
    for weights in WEIGHTS:
        first = lowlat.load(name, dtype=weights, cache=CACHES[0])
        result.append(((weights, CACHES[0]), first))
        for cache in CACHES[1:]:
            other = Model(first.transformer, first.tokenizer, name=name, cache=cache)
            result.append(((weights, cache), other))
    return result


def table(results: Sequence[Quality]) -> str:
    """Markdown, a line per pair."""
    heading = "| model | weights | cache | read as | perplexity | over fp32 | KL | same token |"
    lines = [heading, "|---|---|---|---|---|---|---|---|"]
    exact = {r.model: r.perplexity for r in results if r.weights == "fp32"}
    for r in results:
        increase = r.perplexity / exact[r.model] - 1
        lines.append(
            f"| {r.model} | {r.weights} | {r.cache} | {r.form} | {r.perplexity:.4f} | "
            f"{increase:+.3%} | "
            f"{r.divergence / r.tokens:.2e} | {r.same / r.tokens:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="a UTF-8 text file")
    parser.add_argument("--bytes", type=int, default=100_000, help="length of the text to use")
    parser.add_argument("--models", nargs="+", default=["default", "smollm2-135m"])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--out", type=Path, help="a folder for results.json")
    options = parser.parse_args()
    text = options.text.read_bytes()[: options.bytes].decode(errors="ignore")
    results = [each for name in options.models for each in measure(name, text, options.forms)]
    print(table(results))
    if options.out is not None:
        rows = [asdict(r) | {"perplexity": r.perplexity} for r in results]
        results_file.write(results_file.heading() | {"rows": rows}, options.out)


if __name__ == "__main__":
    main()
