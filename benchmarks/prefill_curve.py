"""Chunked prefill of long prompts: peak memory and time of the last chunk, by prompt length.

    python benchmarks/prefill_curve.py MODEL [--contexts 2048,8192,32768,131072] [--dtype bf16]
        [--cache bf16] [--out FOLDER]

For every length N, a new process loads the model, fills the KV cache with random entries and
prefills the last 2,048 tokens of a prompt of N tokens. Reports the peak resident memory (mapped
weights included), the KV cache's share of it, and the seconds. Prefilling the whole prompt would
take minutes to hours without changing these figures.
"""

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import Any

import results_file
import torch

from lowlat.bench.lowlat_worker import Lowlat
from lowlat.engine.prefill_planner import PREFILL_CHUNK
from lowlat.peers.protocol import peak_memory, random_token_ids, reset_peak_memory

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--contexts", default="2048,8192,32768,131072")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--cache", default="bf16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    contexts = [int(each) for each in args.contexts.split(",")]
    if min(contexts) < PREFILL_CHUNK:
        parser.error(f"--contexts: give at least {PREFILL_CHUNK}, the tokens of a chunk")
    print(f"{'tokens':>8} {'memory':>9} {'of cache':>9} {'the rest':>9} {'seconds':>8}")
    rows: list[Row] = []
    for context in contexts:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(last_chunk, (args.model, args.dtype, args.cache, context))
        rest = row["peak_bytes"] - row["cache_bytes"]
        sizes = (f"{size / 1e9:6.3f} GB" for size in (row["peak_bytes"], row["cache_bytes"], rest))
        print(f"{context:8,} {' '.join(sizes)} {row['seconds']:8.2f}", flush=True)
        rows.append(row)
    if args.out is not None:
        results_file.write(
            results_file.heading() | {"model": Path(args.model).name, "rows": rows}, args.out
        )
        draw(rows, args.out / "plot.svg", f"{Path(args.model).name}, {args.dtype} weights")


def last_chunk(model: str, dtype: str, cache: str, context: int) -> Row:
    """Figures of the last chunk of a prompt of `context` tokens, in this process."""
    program = Lowlat()
    threads = torch.get_num_threads()
    facts = program.load(
        model=model, precision=dtype, cache=cache, threads=threads, context=context
    )
    ids = random_token_ids(PREFILL_CHUNK, program.vocab_size)
    program.prefill(ids)  # maps the weights and allocates buffers
    start = context - PREFILL_CHUNK
    program.fill_cache(context)
    reset_peak_memory()
    began = time.perf_counter()
    program.prefill_after(ids, start)
    return {
        "tokens": context,
        "seconds": time.perf_counter() - began,
        "peak_bytes": peak_memory(),
        "cache_bytes": facts["cache_bytes_per_token"] * context,
        "threads": threads,
    }


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Plot memory and time over the prompt length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    memory, times = figure.subplots(1, 2)
    tokens = [row["tokens"] for row in rows]
    peaks = [row["peak_bytes"] / 1e9 for row in rows]
    caches = [row["cache_bytes"] / 1e9 for row in rows]
    memory.plot(tokens, peaks, "o-", label="process")
    memory.plot(
        tokens, [a - b for a, b in zip(peaks, caches, strict=True)], "s-", label="without KV cache"
    )
    memory.plot(tokens, caches, "^--", label="KV cache")
    memory.set(xlabel="prompt tokens", ylabel="GB", ylim=(0, None))
    memory.legend()
    times.plot(tokens, [row["seconds"] for row in rows], "o-")
    times.set(xlabel="prompt tokens", ylabel="seconds of the last chunk", ylim=(0, None))
    for axes in (memory, times):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":
    main()
