"""Batching speedup: throughput of mixed prompts in one batch over one request at a time.

    python benchmarks/batch.py MODEL [--dtype bf16] [--prompts 64] [--rounds 5] [--out FOLDER]

Prompts are 16 to 512 random tokens, outputs 16 to 96 tokens, half of them sampled. Half of the
single requests run before the batch and half after it, so that drift of the machine's speed cancels
out.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import results_file

import lowlat
from lowlat.generate.model import Model
from lowlat.utils.progress import SilentProgress


def mix(vocab_size: int, count: int) -> tuple[list[list[int]], list[lowlat.SamplingParams]]:
    rng = random.Random(0)
    prompts = [
        [rng.randrange(vocab_size) for _ in range(rng.choice([16, 64, 128, 256, 512]))]
        for _ in range(count)
    ]
    params = [
        lowlat.SamplingParams(
            max_tokens=rng.choice([16, 32, 64, 96]),
            ignore_eos=True,
            temperature=0.8 * (number % 2),
            seed=number,
        )
        for number in range(count)
    ]
    return prompts, params


def seconds_of(
    model: Model,
    prompts: list[list[int]],
    params: list[lowlat.SamplingParams],
    *,
    at_once: bool,
) -> float:
    """Seconds from the first prompt to the last token."""
    assert model.engine.prefix is not None
    model.engine.prefix.clear()
    started = time.perf_counter()
    if at_once:
        model.generate_each(prompts, params, progress=SilentProgress())
    else:
        for prompt, own in zip(prompts, params, strict=True):
            model.generate_each([prompt], [own])
    return time.perf_counter() - started


def tokens_of(params: list[lowlat.SamplingParams]) -> int:
    return sum(own.max_tokens or 0 for own in params)


def round_of(
    model: Model, prompts: list[list[int]], params: list[lowlat.SamplingParams]
) -> tuple[float, float]:
    """Output tokens per second of all prompts, one at a time and in one batch."""
    half = len(prompts) // 2
    alone = seconds_of(model, prompts[:half], params[:half], at_once=False)
    together = seconds_of(model, prompts, params, at_once=True)
    alone += seconds_of(model, prompts[half:], params[half:], at_once=False)
    return tokens_of(params) / alone, tokens_of(params) / together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    model = lowlat.load(args.model, dtype=args.dtype)
    prompts, params = mix(model.config.vocab_size, args.prompts)
    seconds_of(model, prompts[:2], params[:2], at_once=True)
    rounds = []
    for number in range(args.rounds):
        alone, together = round_of(model, prompts, params)
        rounds.append({"alone": alone, "together": together, "ratio": together / alone})
        print(
            f"round {number + 1}: one at a time {alone:.1f} tok/s, {args.prompts} together "
            f"{together:.1f} tok/s: {together / alone:.2f}x"
        )
    ratio = statistics.median(found["ratio"] for found in rounds)
    print(f"{args.model} {args.dtype}: {ratio:.2f}x, median of {args.rounds} rounds")
    if args.out is not None:
        found = {
            "model": args.model,
            "dtype": args.dtype,
            "prompts": args.prompts,
            "prompt_tokens": sum(len(prompt) for prompt in prompts),
            "output_tokens": tokens_of(params),
            "tokens_per_second": rounds,
            "ratio": ratio,
        }
        results_file.write(results_file.heading() | found, args.out)


if __name__ == "__main__":
    main()
