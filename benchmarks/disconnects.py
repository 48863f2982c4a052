"""Disconnect test: 10,000 clients abort, then 1,000 within a second; the server must not leak.

    python benchmarks/disconnects.py MODEL --count 10000 --out benchmarks/results/NAME

Starts `lowlat serve` with a KV cache so small that requests wait for free pages. Clients (--at-once
at a time) disconnect at random moments: while they send the request, right after it, after a while
(the request is queued, in prefill or in decode), while they receive the answer, and after it. Half
of them reset the connection. After every round the server must be idle: no KV cache pages in use,
/health is 200, and a canary request gets its usual answer.

Then a storm: --storm running requests, all aborted within a second. Counts the engine steps from
the last disconnect until all pages are free.

Exits with 1 if pages are not freed within STORM_STEPS, an answer is wrong, or memory, descriptors
or threads grow beyond the bounds of serving/soak_checks.py. Needs Linux.
"""

import argparse
import asyncio
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import results_file
from serving import soak_checks
from serving.client import new_client
from serving.disconnecting import Leaver, Storm, leave_all
from serving.monitor import Watch, fill_cache
from serving.servers import Server, Setup, folder_or_name, lowlat_program
from serving.soak_checks import Sample
from serving.soak_load import Load
from serving.soak_requests import COMPLETIONS, Call, Mix

from lowlat.bench.benchmark_plan import check_threads
from lowlat.utils.errors import UserError

STORM_STEPS = 2
STORM_SECONDS = 1.0
STORM_TOKENS = 400
STORM_GROUP = 200
WARM_CALLS = 60
CHECK_SECONDS = 1.5
"""The idle engine checks its page counts within this time, and exits if a page is lost."""
STORM_TIMEOUT = 900.0
"""Seconds for the storm's requests to arrive, and for their pages to be freed."""
STEPS = "lowlat:engine_steps_total"
ABORTED = 'lowlat:request_success_total{finished_reason="abort"}'
RUNNING, WAITING = "lowlat:num_requests_running", "lowlat:num_requests_waiting"
USED, PAGES = "lowlat:kv_cache_usage_perc", "lowlat:kv_cache_pages"
ENDED = "lowlat:request_success_total"
HTTP = "lowlat:http_requests_total"
BUSY = 'status="429"'
PREEMPTIONS = "lowlat:num_preemptions_total"


class Run:
    """Rounds of disconnecting clients, and the storm, against one server."""

    def __init__(self, server: Server, options: argparse.Namespace, load: Load, mix: Mix) -> None:
        self.leaver = Leaver(server.port, mix, seed=options.seed)
        self.samples: list[Sample] = []
        self.storm: dict[str, Any] = {}
        self._server = server
        self._options = options
        self._load = load
        self._model = server.program.model_name
        self._expected: Any = None

    async def round(self, watch: Watch, count: int) -> None:
        """Disconnect `count` clients, then sample the idle server."""
        await leave_all(self.leaver, count, at_once=self._options.at_once)
        self._load.tally.cancelled += count
        self.samples.append(await watch.idle())
        await self.canary()

    async def canary(self) -> None:
        """Send the canary request; record a failure if its answer has changed."""
        answer = await self._load.canary()
        self._expected = answer if self._expected is None else self._expected
        self._load.tally.canaries += 1
        if answer != self._expected:
            self._load.tally.fault(f"canary changed: {json.dumps(answer)}")

    async def run_storm(self, watch: Watch) -> None:
        """Run the storm, and count the engine steps until all pages are free."""
        before = await watch.metrics()
        storm, count = Storm(port=self._server.port), self._options.storm
        calls = list(self._storm_calls(count))
        started = before
        # In groups, because the server rejects more requests than may wait for tokenization.
        for first in range(0, count, STORM_GROUP):
            await storm.send(calls[first : first + STORM_GROUP])
            sent = min(first + STORM_GROUP, count)
            # On a slow machine the first may be answered before the last arrives.
            started = await until(
                watch, lambda now, sent=sent: arrived(now) - arrived(before) >= sent
            )
        full = await until(watch, lambda now: now[STEPS] >= started[STEPS] + 2)
        seconds = await storm.leave(random.Random(self._options.seed), STORM_SECONDS)
        left = await watch.metrics()
        back = await until(watch, lambda now: not (now[USED] or now[RUNNING] or now[WAITING]))
        self.storm = {
            "requests": count,
            "running": full[RUNNING],
            "waiting": full[WAITING],
            "pages_held": round(full[USED] * full[PAGES]),
            "seconds": seconds,
            "steps_while_leaving": left[STEPS] - full[STEPS],
            "steps_after_the_last": back[STEPS] - left[STEPS],
            "pages_held_after": back[USED] * back[PAGES],
            "aborted": back[ABORTED] - before[ABORTED],
        }
        await self.canary()

    def _storm_calls(self, count: int) -> Iterator[Call]:
        for number in range(count):
            body = {
                "model": self._model,
                "prompt": f"Of {number} kettles the",
                "max_tokens": STORM_TOKENS,
                "ignore_eos": True,
                "stream": number % 2 == 0,
            }
            yield Call(manner="cancelled", path=COMPLETIONS, body=body, kind="storm")


def arrived(metrics: dict[str, float]) -> float:
    """Requests that have arrived: finished, running, waiting, and rejected with 429."""
    ended = sum(value for name, value in metrics.items() if name.startswith(ENDED))
    busy = sum(value for name, value in metrics.items() if name.startswith(HTTP) and BUSY in name)
    return ended + busy + metrics[RUNNING] + metrics[WAITING]


async def until(watch: Watch, condition: Any) -> dict[str, float]:
    """The first metrics that satisfy `condition`, or the last ones after STORM_TIMEOUT."""
    end = time.monotonic() + STORM_TIMEOUT
    while True:
        now = await watch.metrics()
        if condition(now) or time.monotonic() > end:
            return now


async def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Run the test; the report."""
    model = server.program.model_name
    async with new_client(server.url, connections=8) as client:
        load = Load(client, Mix(model, seed=0, has_chat=False, longest=1), model, rate=1.0)
        mix = Mix(model, seed=options.seed, has_chat=await load.has_chat(), longest=options.longest)
        load = Load(client, mix, model, rate=1.0)
        watch = Watch(server, client, load.tally)
        # Processes for chat templates and grammars start on first use.
        await load.warm_up(WARM_CALLS)
        await fill_cache(load, watch)
        run = Run(server, options, load, mix)
        await run.canary()
        before, counts = await watch.idle(), await watch.metrics()
        for number in range(options.rounds):
            await run.round(watch, options.count // options.rounds)
            print(f"round {number + 1}: {asdict(run.samples[-1])}", flush=True)
        await run.run_storm(watch)
    # The clients' connections are closed, so their resources must be free.
    await asyncio.sleep(CHECK_SECONDS)
    async with new_client(server.url, connections=2) as client:
        last = Watch(server, client, load.tally)
        after, now = await last.idle(), await last.metrics()
    return report(options, run, load, before, after, differences(counts, now))


def differences(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """Growth of the server's request counters."""
    names = [name for name in now if name.startswith((ENDED, HTTP, PREEMPTIONS))]
    return {
        name.removeprefix("lowlat:"): now[name] - before.get(name, 0.0)
        for name in names
        if now[name] > before.get(name, 0.0)
    }


def report(
    options: argparse.Namespace,
    run: Run,
    load: Load,
    before: Sample,
    after: Sample,
    counted: dict[str, float],
) -> dict[str, Any]:
    """One JSON object; `faults` lists the failed checks."""
    tally, departures, storm = load.tally, run.leaver.departures, run.storm
    faults = soak_checks.faults(run.samples, before, after)
    faults += [f"round {n + 1}: pages held" for n, s in enumerate(run.samples) if s.cache_usage]
    if tally.fault_count:
        faults.append(f"{tally.fault_count} wrong answers, first: {tally.faults[0]}")
    if storm["steps_after_the_last"] > STORM_STEPS or storm["pages_held_after"]:
        faults.append(f"after the storm pages were freed late: {storm}")
    if bad := {status: n for status, n in departures.unserved.items() if status != "429"}:
        faults.append(f"answers other than 200 and 429: {bad}")
    return results_file.heading() | {
        "model": str(options.model),
        "clients": departures.moments.total(),
        "at_once": options.at_once,
        "moments": dict(departures.moments),
        "resets": departures.resets,
        "received": dict(departures.received),
        "unserved": dict(departures.unserved),
        "storm": storm,
        "server_counted": counted,
        "canaries": tally.canaries,
        "growth": soak_checks.growths(run.samples),
        "before": asdict(before),
        "after": asdict(after),
        "rounds": [asdict(sample) for sample in run.samples],
        "faults": faults,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="MODEL of lowlat serve")
    parser.add_argument("--count", type=int, default=10_000, help="disconnecting clients")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--at-once", type=int, default=100)
    parser.add_argument("--storm", type=int, default=1000, help="requests of the storm")
    parser.add_argument("--longest", type=int, default=96, help="maximum tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache-memory", type=float, default=0.1, metavar="GIB")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    try:
        setup = Setup(
            model=folder_or_name(options.model),
            dtype=options.dtype,
            threads=check_threads(options.threads),
            context=512,
            concurrency=options.at_once,
        )
        more = ["--cache-memory", str(options.cache_memory), "--max-queue", str(options.storm)]
        with (
            tempfile.TemporaryDirectory(prefix="lowlat-disconnects-") as folder,
            Server(
                lowlat_program(setup, more), threads=setup.threads, folder=Path(folder)
            ) as server,
        ):
            server.wait_ready()
            found = asyncio.run(measure(server, options))
            status = server.end()
            if status != 0:
                found["faults"].append(f"the server ended with {status}: {server.last_log_line()}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except (ProcessLookupError, httpx.TransportError) as error:
        sys.exit(f"FAULT the server ended or did not answer: {error!r}")
    if options.out is not None:
        results_file.write(found, options.out)
    shown = {key: found[key] for key in found if key not in ("machine", "rounds")}
    print(json.dumps(shown, indent=1))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
