"""Soak test: a server under mixed load for a long time must not leak or change its outputs.

    python benchmarks/soak.py MODEL --minutes 30 --out benchmarks/results/NAME

Starts `lowlat serve` and sends requests at random times: 10 % aborted by the client, 5 % invalid,
and every 5 s a canary whose answer must not change. Samples the server every 5 s. Exits with 1 if
memory, descriptors or threads grow beyond the bounds of serving/soak_checks.py, an answer is wrong,
/health is not 200, or KV cache pages are in use after the last request. Needs Linux.
"""

import argparse
import asyncio
import csv
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import results_file
from serving import soak_checks
from serving.client import new_client
from serving.monitor import Watch, fill_cache
from serving.servers import Server, Setup, folder_or_name, lowlat_program
from serving.soak_checks import Sample
from serving.soak_load import Load, Tally
from serving.soak_requests import Mix

from lowlat.bench.benchmark_plan import check_threads
from lowlat.bench.results_plot import require_matplotlib
from lowlat.utils.errors import UserError

WARM_CALLS = 60


async def soak(server: Server, options: argparse.Namespace) -> tuple[dict[str, Any], Watch]:
    """Run the test; the report and the samples."""
    model = server.program.model_name
    async with (
        new_client(server.url, connections=256) as client,
        new_client(server.url, connections=2) as watching,
    ):
        load = Load(client, Mix(model, seed=0, has_chat=False, longest=1), model, rate=options.rate)
        has_chat = await load.has_chat()
        mix = Mix(model, seed=options.seed, has_chat=has_chat, longest=options.longest)
        load = Load(client, mix, model, rate=options.rate)
        # Processes for chat templates and grammars start on first use.
        await load.warm_up(WARM_CALLS)
        watch = Watch(server, watching, load.tally)
        await fill_cache(load, watch)
        before = await watch.idle()
        sampling = asyncio.create_task(watch.run())
        await load.run(60.0 * options.minutes)
        if sampling.done():
            sampling.result()  # raises the exception that ended it
        sampling.cancel()
    # The load's connections are closed, so their resources must be free.
    async with new_client(server.url, connections=2) as client:
        last = Watch(server, client, load.tally)
        after = await last.idle()
    return report(options, load.tally, watch.samples, before, after, has_chat=has_chat), watch


def report(
    options: argparse.Namespace,
    tally: Tally,
    samples: Sequence[Sample],
    before: Sample,
    after: Sample,
    *,
    has_chat: bool,
) -> dict[str, Any]:
    """One JSON object; `faults` lists the failed checks."""
    found = soak_checks.faults(samples, before, after)
    if tally.fault_count:
        found.append(f"{tally.fault_count} wrong answers, first: {tally.faults[0]}")
    if not (tally.answered and tally.refused and tally.cancelled and tally.canaries > 1):
        found.append("too few requests for a verdict; give more --minutes or a higher --rate")
    return {
        **results_file.heading(),
        "model": str(options.model),
        "minutes": options.minutes,
        "rate": options.rate,
        "has_chat": has_chat,
        "bounds": {
            "rss_bytes": soak_checks.MEMORY_GROWTH,
            "descriptors": soak_checks.DESCRIPTOR_GROWTH,
            "threads": soak_checks.THREAD_GROWTH,
            "idle_descriptors": soak_checks.IDLE_DESCRIPTORS,
        },
        "growth": soak_checks.growths(samples),
        "before": asdict(before),
        "after": asdict(after),
        "tally": asdict(tally),
        "faults": found,
    }


def write(found: dict[str, Any], samples: Sequence[Sample], folder: Path) -> None:
    """results.json, samples.csv and plot.svg."""
    results_file.write(found, folder)
    with (folder / "samples.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Sample)])
        table.writeheader()
        table.writerows(asdict(sample) for sample in samples)
    draw(samples, folder / "plot.svg")


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Memory, descriptors and threads, requests and cache over time."""
    from matplotlib.figure import Figure

    minutes = [sample.seconds / 60 for sample in samples]
    figure = Figure(figsize=(8, 9), layout="constrained")
    panels: tuple[dict[str, list[float]], ...] = (
        {"resident memory, MB": [s.rss_bytes / 1e6 for s in samples]},
        {
            "descriptors": [s.descriptors for s in samples],
            "threads": [s.threads for s in samples],
        },
        {"running": [s.running for s in samples], "waiting": [s.waiting for s in samples]},
        {"share of KV cache pages in use": [s.cache_usage for s in samples]},
    )
    for place, lines in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, place + 1, xlabel="minutes")
        for label, values in lines.items():
            axes.plot(minutes, values, label=label)
        axes.set_ylim(
            0.0, 1.25 * max(1e-9, *(value for values in lines.values() for value in values))
        )
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.savefig(path)


def summary(found: dict[str, Any]) -> str:
    tally, growth = found["tally"], found["growth"]
    return (
        f"{found['minutes']:g} minutes: {tally['answered']} answered, "
        f"{tally['cancelled']} aborted, {tally['refused']} invalid ones rejected, "
        f"{tally['busy']} rejected with 429, {tally['canaries']} canaries; "
        f"growth after the warm-up: memory {growth['rss_bytes'] / 1e6:+.1f} MB, descriptors "
        f"{growth['descriptors']:+.1f}, threads {growth['threads']:+.1f}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="MODEL of lowlat serve")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second, on average")
    parser.add_argument("--longest", type=int, default=48, help="maximum tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--cache-memory", type=float, default=0.05, metavar="GIB")
    parser.add_argument("--lowlat-args", default="", help="more options of lowlat serve")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the server's log there")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        if options.out is not None:
            require_matplotlib()
            options.out.mkdir(parents=True, exist_ok=True)
        setup = Setup(
            model=folder_or_name(options.model),
            dtype=options.dtype,
            threads=check_threads(options.threads),
            context=options.context,
            concurrency=64,
        )
        more = ["--cache-memory", str(options.cache_memory), *shlex.split(options.lowlat_args)]
        program = lowlat_program(setup, more)
        with tempfile.TemporaryDirectory(prefix="lowlat-soak-") as folder:
            logs = Path(folder) if options.logs is None else options.logs
            logs.mkdir(parents=True, exist_ok=True)
            with Server(program, threads=setup.threads, folder=logs.resolve()) as server:
                server.wait_ready()
                found, watch = asyncio.run(soak(server, options))
                status = server.end()
            if status != 0:
                found["faults"].append(f"the server ended with {status}: {server.last_log_line()}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except ProcessLookupError:
        sys.exit("FAULT the server ended while it was under load")
    if options.out is not None:
        write(found, watch.samples, options.out)
    print(summary(found))
    for fault in found["faults"]:
        print(f"FAULT {fault}")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
