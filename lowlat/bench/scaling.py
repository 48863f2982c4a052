"""Scaling curve over threads: throughput by number of threads, and the phase that limits it.

Every number of threads is a benchmark run of its own, with the machine's peak rates at that number.
The limiting phase of a case is the one with the largest lower bound in the step model (weights or
attention, by memory bandwidth or by arithmetic). If the bounds explain less than half of the time,
no phase is the limit: barriers and serial parts are if fewer threads come nearer to their bound,
else kernels, which are as far below the roofline with few threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lowlat.bench import run
from lowlat.bench.benchmark_plan import BenchmarkPlan
from lowlat.bench.results_table import heading, new_table, number
from lowlat.bench.roofline import RATES, plain_rate
from lowlat.utils.progress import Progress

EXPLAINED = 0.5
"""Least share of a case's time that its bound explains if one of its phases is the limit."""
FALL = 0.8
"""Share of the bound with the most threads over that with the fewest, below which barriers and
serial parts are the limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseScaling:
    """Throughput of one case by number of threads."""

    kind: str
    tokens: int
    rates: tuple[float | None, ...]
    """Tokens per second for each number of threads."""
    limit: str
    """The limiting phase at the largest number of threads."""
    resource_speedup: float | None
    """How the peak rates of that phase scale over the same numbers of threads; None where no phase
    is the limit."""

    @property
    def speedup(self) -> float | None:
        """Throughput with the most threads over that with the fewest."""
        first, last = self.rates[0], self.rates[-1]
        return last / first if first and last else None


def bench_scaling(
    model: str, plan: BenchmarkPlan, threads: Sequence[int], progress: Progress
) -> dict[str, Any]:
    """Benchmark `plan` with every number of `threads`: a JSON object with the results of each run
    and the scaling of each case. Raises UserError as `run.bench`.
    """
    runs = [run.bench(model, replace(plan, threads=count), progress) for count in threads]
    return {"threads": list(threads), "cases": _objects(case_scaling(runs)), "runs": runs}


def _objects(cases: Sequence[CaseScaling]) -> list[dict[str, Any]]:
    return [
        {
            "kind": case.kind,
            "tokens": case.tokens,
            "tokens_per_second": list(case.rates),
            "speedup": case.speedup,
            "limit": case.limit,
            "resource_speedup": case.resource_speedup,
        }
        for case in cases
    ]


def case_scaling(runs: Sequence[dict[str, Any]]) -> list[CaseScaling]:
    """The scaling of every case of benchmark results `runs`, fewest threads first."""
    rows = [_rows(results) for results in runs]
    found = []
    for key, last in rows[-1].items():
        limit, speedup = limiting_phase(rows[0][key], last)
        found.append(
            CaseScaling(
                kind=key[0],
                tokens=key[1],
                rates=tuple(each[key]["tokens_per_second"] for each in rows),
                limit=limit,
                resource_speedup=speedup,
            )
        )
    return found


def limiting_phase(fewest: dict[str, Any], most: dict[str, Any]) -> tuple[str, float | None]:
    """(what limits a case with the most threads, by how much its bound falls from the fewest to the
    most threads; None where no phase is the limit), from lowlat's rows with both numbers."""
    share, alone = ((row["share_of_serial_bound"] or 0.0) for row in (most, fewest))
    if share < EXPLAINED:
        is_falling = share < FALL * alone
        return "barriers and serial parts" if is_falling else "kernels below the roofline", None
    bounds = {
        (phase, resource): seconds
        for phase, resources in most["bound_seconds"].items()
        for resource, seconds in resources.items()
    }
    phase, resource = max(bounds, key=lambda key: bounds[key])
    name = "memory bandwidth" if resource == "memory" else resource
    speedup = fewest["bound_seconds"][phase][resource] / bounds[phase, resource]
    return f"{phase}, by {name}", speedup


def _rows(results: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """lowlat's rows by case."""
    rows = (row for row in results["rows"] if row["program"] == "lowlat")
    return {(row["kind"], row["tokens"]): row for row in rows}


def show_scaling(scaling: dict[str, Any], console: Console | None = None) -> None:
    """Print the scaling curve as a table: a line per case and per peak rate."""
    console = Console() if console is None else console
    console.print(heading(scaling["runs"][-1]), highlight=False)
    console.print()
    console.print(scaling_table(scaling))


def scaling_table(scaling: dict[str, Any]) -> Table:
    """Tokens per second by number of threads, the speedup of the most over the fewest threads, and
    the limiting phase with the speedup of its peak rate."""
    threads = scaling["threads"]
    table = new_table("threads", "", *map(str, threads), "speedup")
    table.add_column("limit", style="dim")
    for case in scaling["cases"]:
        rates = [number(rate) if rate else "-" for rate in case["tokens_per_second"]]
        speedup = f"{case['speedup']:.2f}x" if case["speedup"] else "-"
        peak = case["resource_speedup"]
        limit = case["limit"] if peak is None else f"{case['limit']} ({peak:.2f}x)"
        table.add_row(f"{case['kind']} {case['tokens']:,}", "tok/s", *rates, speedup, limit)
    table.add_section()
    peaks = [results["calibration"]["median"] for results in scaling["runs"]]
    dtype = scaling["runs"][-1]["plan"]["dtype"]
    gemms = dict.fromkeys((plain_rate(dtype), RATES[dtype]))
    for name, unit in (("bandwidth", "GB/s"), *((gemm, "GFLOP/s") for gemm in gemms)):
        values = [peak[name] for peak in peaks]
        cells = [number(value / 1e9) for value in values]
        table.add_row(name, unit, *cells, f"{values[-1] / values[0]:.2f}x", "", style="dim")
    return table
