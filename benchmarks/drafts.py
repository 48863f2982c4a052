"""Speedup of speculative decoding: the same continuations with and without it.

    python benchmarks/drafts.py MODEL --text FILE [--dtype bf16] [--prompts 16] [--tokens 128]

Prompts are 32 tokens each, from evenly spread positions of FILE. One sequence at a time, greedy and
at temperature 1, with and without speculation interleaved; both must generate the same tokens.
"""

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lowlat
from lowlat.generate.model import Model

PROMPT_TOKENS = 32


def run(
    model: Model, prompts: list[list[int]], params: lowlat.SamplingParams
) -> tuple[list[Any], float]:
    """Completions, and tokens per second from the first prompt to the last token."""
    assert model.engine.prefix is not None
    model.engine.prefix.clear()
    started = time.perf_counter()
    found = [model.generate_each([prompt], [params])[0][0] for prompt in prompts]
    return found, len(prompts) * (params.max_tokens or 0) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with_drafts, without = (
        lowlat.load(args.model, dtype=args.dtype, speculates=speculates)
        for speculates in (True, False)
    )
    counts = Counter[str]()
    with_drafts.engine.recorder.verified = lambda **own: counts.update(own)
    ids = without.tokenizer.encode(args.text.read_text(encoding="utf-8"))
    step = len(ids) // args.prompts
    prompts = [ids[start : start + PROMPT_TOKENS] for start in range(0, step * args.prompts, step)]
    for temperature in (0.0, 1.0):
        params = lowlat.SamplingParams(
            max_tokens=args.tokens, temperature=temperature, seed=1, ignore_eos=True
        )
        run(with_drafts, prompts[:2], params)
        run(without, prompts[:2], params)
        counts.clear()
        speeds: tuple[list[float], list[float]] = [], []
        for _ in range(args.rounds):
            texts = []
            for side, model in enumerate((with_drafts, without)):
                found, speed = run(model, prompts, params)
                texts.append(found)
                speeds[side].append(speed)
            assert texts[0] == texts[1], "speculation changed the tokens"
        ratios = [own / other for own, other in zip(*speeds, strict=True)]
        accepted = counts["accepted"] / max(1, counts["drafted"])
        print(
            f"temperature {temperature:g}: {statistics.median(speeds[0]):.1f} tok/s with drafts, "
            f"{statistics.median(speeds[1]):.1f} without, {statistics.median(ratios):.2f}x "
            f"({min(ratios):.2f} to {max(ratios):.2f}); {accepted:.0%} of {counts['drafted']:,} "
            "drafts accepted"
        )


if __name__ == "__main__":
    main()
