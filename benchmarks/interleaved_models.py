"""Interleaved decode and prefill of several models: a changing machine distorts their ratios least.

    python benchmarks/interleaved_models.py /tmp/mini /tmp/mini-dsa --decode 32768,131072 \\
        --prefill 32768,131072 --out FOLDER

All models stay loaded, each in a process of its own. A turn times a few decode steps of one model,
then of the next. The table has medians, and the median of the ratios of each turn to the first
model's with its quartiles. The KV cache is filled with copies of 1,024 computed entries. The time
of a prefill is the sum over its chunks of 2,048 tokens, of which those at 0, 1/4, 1/2, 3/4 and the
end of the prompt are timed; the others are interpolated.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import results_file

from lowlat.bench.lowlat_worker import Lowlat
from lowlat.engine.prefill_planner import PREFILL_CHUNK
from lowlat.ops import native
from lowlat.peers.protocol import random_token_ids

STEPS = 8
"""Decode steps of a turn."""
POINTS = 5
"""Chunks of a prefill that are timed."""

program = Lowlat()
"""The model of this process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--decode", type=lengths, default=[])
    parser.add_argument("--prefill", type=lengths, default=[])
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--cache", default="bf16")
    parser.add_argument("--rounds", type=int, default=20, help="of decode; prefill has 3")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if any(length % PREFILL_CHUNK for length in args.prefill):
        parser.error(f"--prefill: give multiples of {PREFILL_CHUNK}, the tokens of a chunk")
    rows = []
    with ExitStack() as stack:
        pools = [stack.enter_context(get_context("spawn").Pool(1)) for _ in args.models]
        for pool, model in zip(pools, args.models, strict=True):
            pool.apply(load, (model, args.dtype, args.cache, native.threads()))
        for kind, contexts in (("decode", args.decode), ("prefill", args.prefill)):
            for context in contexts:
                rows += measure(pools, args.models, kind, context, args.rounds)
    if args.out is not None:
        settings = {"dtype": args.dtype, "cache": args.cache}
        results_file.write(results_file.heading() | settings | {"rows": rows}, args.out)


def lengths(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def measure(
    pools: list[Pool], models: list[str], kind: str, context: int, rounds: int
) -> list[dict[str, Any]]:
    """A row per model, printed."""
    if kind == "decode":
        seconds = turns(pools, decode_seconds, (context,), rounds)
        tokens = 1
    else:
        places = [number * (context - PREFILL_CHUNK) / (POINTS - 1) for number in range(POINTS)]
        points = [turns(pools, chunk_seconds, (round(place),), 3) for place in places]
        seconds = [
            [whole_prefill(parts) for parts in zip(*each, strict=True)]
            for each in zip(*points, strict=True)
        ]
        seconds = [[part * context / PREFILL_CHUNK for part in each] for each in seconds]
        tokens = context
    rows = []
    for model, own in zip(models, seconds, strict=True):
        ratios = [first / mine for first, mine in zip(seconds[0], own, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rate = tokens / statistics.median(own)
        name = Path(model).name
        print(f"{kind} {context:8,} {name:20} {rate:9.2f} tok/s  {middle:6.3f}x", end="")
        print(f" ({low:.3f} to {high:.3f})", flush=True)
        row = {"kind": kind, "tokens": context, "model": name, "tokens_per_second": rate}
        rows.append(row | {"ratio_to_first": middle, "quartiles": [low, high]})
    return rows


def turns(
    pools: list[Pool], run: Callable[..., float], arguments: tuple[int, ...], rounds: int
) -> list[list[float]]:
    """Seconds of each model in each round, without a first one that warms up; every other round
    begins with the last model."""
    for pool in pools:
        pool.apply(run, arguments)
    seconds: list[list[float]] = [[] for _ in pools]
    for number in range(rounds):
        order = list(zip(pools, seconds, strict=True))
        for pool, own in order if number % 2 == 0 else reversed(order):
            own.append(pool.apply(run, arguments))
    return seconds


def whole_prefill(points: tuple[float, ...]) -> float:
    """Mean seconds of a chunk, from chunks at equal distances: the trapezoidal rule."""
    return statistics.mean((first + second) / 2 for first, second in itertools.pairwise(points))


# --- in a model's process ----------------------------------------------------------------------


def load(model: str, dtype: str, cache: str, threads: int) -> None:
    program.load(model=model, precision=dtype, cache=cache, threads=threads, context=0)


def decode_seconds(context: int) -> float:
    """Seconds of a decode step."""
    program.fill_cache(context)
    tokens = random_token_ids(STEPS, program.vocab_size)
    began = time.perf_counter()
    for token in tokens:
        program.decode_step(token, context)
    return (time.perf_counter() - began) / STEPS


def chunk_seconds(start: int) -> float:
    """Seconds of a prefill chunk after `start` cached tokens."""
    program.fill_cache(start + PREFILL_CHUNK)
    ids = random_token_ids(PREFILL_CHUNK, program.vocab_size)
    began = time.perf_counter()
    program.prefill_after(ids, start)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
