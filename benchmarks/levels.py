"""Throughput of lowlat's native kernels by ISA level (avx512, avx2, portable) on the same weights.

    python benchmarks/levels.py MODEL [--levels avx512,avx2,portable] [--dtype bf16]
        [--prefill 512,2048] [--decode 128,2048,8192] [--rounds 3] [--out FOLDER]

Each level runs in its own process, stopped while others are measured. By default, all levels of
this machine are measured, best first. A round runs every prompt once and decodes for up to three
seconds per length; the first round is a warm-up. Reports tokens per second, the median of the
rounds. A MODEL in fp8 blocks needs --dtype fp8.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import results_file

from lowlat.bench.benchmark_plan import check_threads, parse_lengths
from lowlat.bench.session import MODULES
from lowlat.ops import native
from lowlat.peers.worker import PeerError, Worker
from lowlat.utils.errors import UserError

STEPS, SECONDS = 100, 3.0
"""Limits of a decode round at one length: steps, and seconds."""
Rates = dict[tuple[str, str, int], list[float]]
"""Tokens per second of every round, by level, kind and length."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--levels", default=",".join(native.levels()))
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--prefill", default="512,2048")
    parser.add_argument("--decode", default="128,2048,8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a folder for results.json")
    options = parser.parse_args()
    try:
        rates = measure(options)
    except (UserError, PeerError) as error:
        print(f"levels.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    show(rates)
    if options.out is not None:
        rows = [
            {"level": level, "kind": kind, "tokens": tokens, "tokens_per_second": own}
            for (level, kind, tokens), own in rates.items()
        ]
        found = {"model": Path(options.model).name, "dtype": options.dtype, "rows": rows}
        results_file.write(results_file.heading() | found, options.out)


def measure(options: argparse.Namespace) -> Rates:
    """Run all rounds. Raises UserError for unsupported levels, lengths and data types."""
    prompts = parse_lengths("--prefill", options.prefill)
    contexts = parse_lengths("--decode", options.decode)
    levels = options.levels.split(",")
    rates: Rates = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        context = max([*prompts, *contexts]) + STEPS
        workers = {
            level: stack.enter_context(start(level, options, context, folder)) for level in levels
        }
        for number in range(options.rounds + 1):
            order = levels[number % len(levels) :] + levels[: number % len(levels)]
            for tokens in prompts:
                for level in order:
                    taken = workers[level].ask("prefill", tokens=tokens)["seconds"]
                    rates.setdefault((level, "prefill", tokens), []).append(tokens / taken)
            for cached in contexts:
                for level in order:
                    asked = {"context": cached, "steps": STEPS, "seconds": SECONDS}
                    steps = workers[level].ask("decode", **asked)["step_seconds"]
                    rate = 1 / statistics.median(steps)
                    rates.setdefault((level, "decode", cached), []).append(rate)
            if number == 0:  # the warm-up
                rates.clear()
    return {key: rates[key] for key in sorted(rates, key=lambda key: levels.index(key[0]))}


def start(level: str, options: argparse.Namespace, context: int, folder: Path) -> Worker:
    """A worker of ISA level `level` that has loaded the model."""
    threads = check_threads(None)
    os.environ[native.ISA_VARIABLE] = level  # inherited by the worker
    worker = Worker(
        "lowlat", MODULES["lowlat"], python=sys.executable, threads=threads, folder=folder
    )
    asked = {"precision": options.dtype, "cache": "bf16", "threads": threads, "context": context}
    worker.ask("load", model=str(Path(options.model).resolve()), **asked)
    return worker


def show(rates: Mapping[tuple[str, str, int], list[float]]) -> None:
    """Print a line per length: medians by level, with their ratio to the first level."""
    levels = list(dict.fromkeys(level for level, _, _ in rates))
    print(f"{'':>16}" + "".join(f"{level:>18}" for level in levels))
    for kind, tokens in dict.fromkeys((kind, tokens) for _, kind, tokens in rates):
        medians = [statistics.median(rates[level, kind, tokens]) for level in levels]
        cells = [f"{medians[0]:18.1f}"]
        cells += [f"{own:10.1f} ({own / medians[0]:4.2f})" for own in medians[1:]]
        print(f"{kind:>8} {tokens:7,}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
