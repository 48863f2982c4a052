"""Overload test: at 10x capacity, rejections must be fast and admitted requests correct.

    python benchmarks/overload.py MODEL --factor 10 --seconds 30 --out benchmarks/results/NAME

Starts `lowlat serve`, sends each prompt alone once for its reference answer, and measures the
request rate at --concurrency. Then sends requests at FACTOR times that rate, at random times, each
on its own connection. Client and server share the machine, so latencies include the client's work.

Exits with 1 if a rejection is not a 429 with Retry-After, the 99th percentile of rejection times is
above 100 ms, an admitted request fails or differs from its reference answer, /health is not 200, or
memory grows by more than MEMORY_BYTES. Needs Linux.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import results_file
from serving.process import usage
from serving.servers import HOST, Server, Setup, folder_or_name, lowlat_program

from lowlat.bench.benchmark_plan import check_threads
from lowlat.utils.errors import UserError

REFUSAL_SECONDS = 0.1
"""Bound of the 99th percentile of rejection times."""
MEMORY_BYTES = 64 << 20
"""Bound of the growth between the second and the last tenth of the overload."""
CONTEXT = 512
NUM_PROMPTS = 24
TIMEOUT = 600.0


@dataclass(kw_only=True, slots=True)
class Reply:
    """One response; times in seconds."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


@dataclass(kw_only=True, slots=True)
class Tally:
    """Responses and their times in seconds."""

    statuses: Counter[str] = field(default_factory=Counter)
    refusals: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Client:
    """Sends completion requests and compares the answers with reference answers."""

    def __init__(self, port: int, *, tokens: int, seed: int) -> None:
        rng = random.Random(seed)
        words = ["sun", "rain", "stone", "river", "bread", "seven", "green", "under", "letter"]
        self.prompts = [" ".join(rng.choices(words, k=12)) for _ in range(NUM_PROMPTS)]
        self.tally = Tally()
        self._rng = rng
        self._port = port
        self._tokens = tokens
        self._answers: dict[str, str] = {}

    async def learn(self) -> None:
        """Get the reference answer of each prompt, one request at a time."""
        for prompt in self.prompts:
            reply = await self.send(self._request(prompt))
            if reply.status != 200:
                raise UserError(f"the server answers {reply.status}: {reply.body[:200]!r}")
            self._answers[prompt] = _text(reply)

    async def serve_rate(self, concurrency: int, seconds: float) -> float:
        """Served requests per second at this concurrency."""
        end, done = time.perf_counter() + seconds, 0

        async def loop() -> None:
            nonlocal done
            while time.perf_counter() < end:
                reply = await self.send(self._request(self._rng.choice(self.prompts)))
                done += reply.status == 200

        begin = time.perf_counter()
        await asyncio.gather(*(loop() for _ in range(concurrency)))
        return done / (time.perf_counter() - begin)

    async def overload(self, rate: float, seconds: float) -> None:
        """Send `rate` requests per second (Poisson), and wait for all responses."""
        end = time.perf_counter() + seconds
        watching = asyncio.create_task(self._watch_health())
        async with asyncio.TaskGroup() as group:
            moment = time.perf_counter()
            while moment < end:
                moment += self._rng.expovariate(rate)
                await asyncio.sleep(max(0.0, moment - time.perf_counter()))
                group.create_task(self._ask())
        watching.cancel()

    async def send(self, data: bytes) -> Reply:
        """Send one request on its own connection."""
        begin = time.perf_counter()
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection(HOST, self._port)
            try:
                writer.write(data)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.strip().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines)
                body = await reader.readexactly(int(headers["content-length"]))
            finally:
                writer.close()
        seconds = time.perf_counter() - begin
        return Reply(status=int(first.split()[1]), headers=headers, body=body, seconds=seconds)

    async def _ask(self) -> None:
        prompt, tally = self._rng.choice(self.prompts), self.tally
        try:
            reply = await self.send(self._request(prompt))
        except (OSError, EOFError, TimeoutError) as error:
            tally.statuses[type(error).__name__] += 1
            tally.faults.append(f"no answer: {error!r}")
            return
        tally.statuses[str(reply.status)] += 1
        if reply.status == 200:
            tally.served.append(reply.seconds)
            if _text(reply) != self._answers[prompt]:
                tally.faults.append(f"differs from the reference answer: {reply.body[:200]!r}")
        elif reply.status == 429 and reply.headers.get("retry-after", "").isdecimal():
            tally.refusals.append(reply.seconds)
        else:
            tally.faults.append(f"{reply.status} {reply.headers} {reply.body[:200]!r}")

    async def _watch_health(self) -> None:
        data = f"GET /health HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
        while True:
            reply = await self.send(data)
            self.tally.health.append(reply.seconds)
            if reply.status != 200:
                self.tally.faults.append(f"/health is {reply.status}")
            await asyncio.sleep(0.25)

    def _request(self, prompt: str) -> bytes:
        value = {"model": "model", "prompt": prompt, "max_tokens": self._tokens, "temperature": 0}
        body = json.dumps(value | {"ignore_eos": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def _text(reply: Reply) -> str:
    return json.loads(reply.body)["choices"][0]["text"]


async def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Run the test; the report."""
    client = Client(server.port, tokens=options.tokens, seed=options.seed)
    await client.learn()
    rate = await client.serve_rate(options.concurrency, options.seconds / 3)
    samples: list[int] = []

    async def watch_memory() -> None:
        while True:
            samples.append(usage(server.pid).rss_bytes)
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch_memory())
    await client.overload(options.factor * rate, options.seconds)
    watching.cancel()
    return report(options, client.tally, rate, samples)


def report(
    options: argparse.Namespace, tally: Tally, rate: float, samples: Sequence[int]
) -> dict[str, Any]:
    """One JSON object; `faults` lists the failed checks."""
    tenth = max(1, len(samples) // 10)
    grown = statistics.median(samples[-tenth:]) - statistics.median(samples[tenth : 2 * tenth])
    faults = list(tally.faults)
    refusals = quantiles(tally.refusals)
    if not tally.refusals or not tally.served:
        faults.append("nothing was rejected, or nothing served; raise --factor or --seconds")
    elif refusals["p99"] > REFUSAL_SECONDS:
        faults.append(f"the 99th percentile of rejections is {1e3 * refusals['p99']:.0f} ms")
    if grown > MEMORY_BYTES:
        faults.append(f"memory grew by {grown / 1e6:.0f} MB")
    return {
        **results_file.heading(),
        "model": str(options.model),
        "factor": options.factor,
        "seconds": options.seconds,
        "queue": options.queue,
        "serve_rate": rate,
        "statuses": dict(tally.statuses),
        "refusal_seconds": refusals,
        "served_seconds": quantiles(tally.served),
        "health_seconds": quantiles(tally.health),
        "rss_bytes": {"first": samples[0], "last": samples[-1], "grown": grown},
        "fault_count": len(faults),
        "faults": faults[:20],
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile, maximum; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max": ordered[-1],
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="MODEL of lowlat serve")
    parser.add_argument("--factor", type=float, default=10.0, help="times the served rate")
    parser.add_argument("--seconds", type=float, default=30.0, help="of overload")
    parser.add_argument("--queue", type=int, default=16, help="maximum waiting requests")
    parser.add_argument("--concurrency", type=int, default=64, help="to measure the served rate")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        setup = Setup(
            model=folder_or_name(options.model),
            dtype=options.dtype,
            threads=check_threads(options.threads),
            context=CONTEXT,
            concurrency=options.concurrency,
        )
        more = ["--max-queue", str(options.queue), "--cache-memory", "0.25"]
        with (
            tempfile.TemporaryDirectory(prefix="lowlat-overload-") as folder,
            Server(
                lowlat_program(setup, more), threads=setup.threads, folder=Path(folder)
            ) as server,
        ):
            server.wait_ready()
            found = asyncio.run(measure(server, options))
    except UserError as error:
        sys.exit(f"error: {error}")
    if options.out is not None:
        results_file.write(found, options.out)
    print(json.dumps({key: found[key] for key in found if key != "machine"}, indent=1))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
