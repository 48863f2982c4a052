"""Measure disaggregated prefill: time between tokens of streams while long prompts arrive.

Prefill runs in processes of its own (apart) or not (mixed); also measured: the bytes of pages.

    python benchmarks/disaggregated_prefill.py MODEL --prompt 32768 [--prompts 3] [--streams 8]
        [--rounds 3] [--cores 2] [--dtype bf16] [--cache auto] [--out FOLDER]

Both servers have --cores threads: mixed in one process, apart in two with half of them each. Every
round starts each server afresh. Streams run before the first long prompt and after the last; the
figures are of the time between. The texts that follow the long prompts must be equal. Exits with 1
if they differ or a request fails.
"""

import argparse
import asyncio
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import results_file
from serving.client import body_of, events, new_client
from serving.figures import percentile
from serving.servers import Program, Server, Setup, folder_or_name, lowlat_program
from serving.workload import Span, Work, draw_work

from lowlat import api
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config

STREAM_PROMPT = 32
NEW_TOKENS = 16
"""After a long prompt."""
KINDS = ("apart", "mixed")


@dataclass(kw_only=True, slots=True)
class Stream:
    """A streamed response: its text, and when its pieces came."""

    text: str = ""
    pieces: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=32768, help="tokens of a long prompt")
    parser.add_argument("--prompts", type=int, default=3, help="long prompts, one after another")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--stream-tokens", type=int, default=32768, help="at most, per stream")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--cache", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as scratch:
                row = asyncio.run(measure(args, kind, Path(scratch), seed=number))
            found[kind].append(row)
            print(line(kind, row), flush=True)
    equal = [found["apart"][n]["texts"] == found["mixed"][n]["texts"] for n in range(args.rounds)]
    for row in [*found["apart"], *found["mixed"]]:
        del row["texts"]
    if args.out is not None:
        results_file.write(results_file.heading() | {**found, "tokens_equal": equal}, args.out)
    if not all(equal):
        sys.exit("the texts differ")


def program(args: argparse.Namespace, kind: str) -> Program:
    """The server of `kind`, under the same number of threads in all."""
    context = max(args.prompt + NEW_TOKENS, STREAM_PROMPT + args.stream_tokens)
    setup = Setup(
        model=folder_or_name(args.model),
        dtype=args.dtype,
        threads=args.cores if kind == "mixed" else max(1, args.cores // 2),
        context=context,
        concurrency=args.streams + 1,
    )
    mixed = lowlat_program(setup, ["--cache", args.cache])
    if kind == "mixed":
        return mixed
    start = mixed.command.index("serve")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", "-m", "lowlat", *mixed.command[start:]]
    return Program(name=kind, command=[*command, "--parallel", "prefill=1"], extra=mixed.extra)


async def measure(
    args: argparse.Namespace, kind: str, scratch: Path, *, seed: int
) -> dict[str, Any]:
    """Figures of one server, in seconds and bytes."""
    vocab_size = read_config(open_checkpoint(api.prepare(args.model))).vocab_size
    short, long, output = (Span(low=n, high=n) for n in (STREAM_PROMPT, args.prompt, NEW_TOKENS))
    endless = Span(low=args.stream_tokens, high=args.stream_tokens)
    drawn = {"shared": 0, "vocab_size": vocab_size, "seed": seed}
    streams = draw_work(args.streams, prompt=short, output=endless, **drawn)
    prompts = draw_work(args.prompts, prompt=long, output=output, **drawn)
    server = Server(program(args, kind), threads=1, folder=scratch)
    with server:
        server.wait_ready()
        async with new_client(server.url, connections=args.streams + 2) as client:
            return await under_load(client, server.program, streams, prompts)


async def under_load(
    client: httpx.AsyncClient, served: Program, streams: list[Work], prompts: list[Work]
) -> dict[str, Any]:
    """Send `prompts` one after another while all `streams` run."""
    running = [Stream() for _ in streams]
    pairs = zip(streams, running, strict=True)
    tasks = [asyncio.create_task(read(client, served, work, into)) for work, into in pairs]
    while not all(stream.pieces for stream in running):
        await check(tasks)
    # Undisturbed, for comparison.
    before = time.perf_counter()
    for _ in range(50):
        await check(tasks)
    begun, texts, ttft = time.perf_counter(), [], []
    for work in prompts:
        started, answer = time.perf_counter(), Stream()
        reading = asyncio.create_task(read(client, served, work, answer))
        while not reading.done():
            await check(tasks)
        await reading
        texts.append(answer.text)
        ttft.append(answer.pieces[0] - started)
    ended = time.perf_counter()
    transferred = await counter(client, "lowlat:kv_transfer_bytes_total")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gaps = gaps_between(running, begun, ended)
    alone = gaps_between(running, before, begun)
    return {
        "itl_p50": percentile(gaps, 0.5),
        "itl_p99": percentile(gaps, 0.99),
        "itl_max": max(gaps),
        "alone_itl_p50": percentile(alone, 0.5),
        "alone_itl_p99": percentile(alone, 0.99),
        "tokens_per_second": len(gaps) / (ended - begun),
        "ttft": ttft,
        "seconds": ended - begun,
        "transferred_bytes": transferred,
        "texts": texts,
    }


async def check(tasks: list[asyncio.Task[None]]) -> None:
    """Wait a moment. Raises the error of a stream that has ended, which none should."""
    await asyncio.sleep(0.1)
    for task in tasks:
        if task.done():
            await task
            raise RuntimeError("a stream ended before the long prompts; raise --stream-tokens")


async def read(client: httpx.AsyncClient, served: Program, work: Work, into: Stream) -> None:
    """Read one response. Raises RuntimeError if it fails."""
    body = body_of(work, served.model_name, served.extra)
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode(errors="replace")[:300])
        async for event in events(response):
            if "error" in event:
                raise RuntimeError(str(event["error"])[:300])
            for choice in event.get("choices", ()):
                into.text += choice.get("text") or ""
                into.pieces.append(time.perf_counter())


async def counter(client: httpx.AsyncClient, name: str) -> float:
    """The value of a counter of /metrics."""
    text = (await client.get("/metrics")).text
    found = re.search(rf"^{name}\S* (\S+)$", text, re.MULTILINE)
    return 0.0 if found is None else float(found[1])


def gaps_between(streams: list[Stream], start: float, end: float) -> list[float]:
    """Seconds between pieces of a stream, those that end from `start` to `end`."""
    gaps = []
    for stream in streams:
        pairs = zip(stream.pieces, stream.pieces[1:], strict=False)
        gaps += [after - before for before, after in pairs if start <= after <= end]
    return gaps


def line(kind: str, row: dict[str, Any]) -> str:
    times = [f"{1e3 * row[f'itl_{name}']:.1f}" for name in ("p50", "p99", "max")]
    return (
        f"{kind}: time between tokens p50/p99/max {'/'.join(times)} ms "
        f"({1e3 * row['alone_itl_p99']:.1f} ms p99 without long prompts), "
        f"{row['tokens_per_second']:.0f} tokens/s, "
        f"time to first token {', '.join(f'{t:.1f}' for t in row['ttft'])} s, "
        f"{row['transferred_bytes'] / 1e6:,.1f} MB transferred"
    )


if __name__ == "__main__":
    main()
