"""Benchmark results: one JSON object with every sample and the figures derived from them."""

import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowlat.bench.benchmark_plan import BenchmarkCase
from lowlat.bench.inputs import BenchmarkInputs
from lowlat.bench.measure import CaseResult, median_rates
from lowlat.bench.roofline import time_bound
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.ops import native
from lowlat.plan.serving.step_cost import TimeBound
from lowlat.utils.machine import package_version, physical_memory, processor
from lowlat.utils.topology import machine_topology

FORMAT = 1
"""Version of the JSON object."""
PACKAGES = ("lowlat", "torch", "numpy")


def build(
    inputs: BenchmarkInputs,
    *,
    started: float,
    programs: Mapping[str, dict[str, Any]],
    rows: Sequence[CaseResult],
    rates: Sequence[dict[str, float]],
    starts: Mapping[str, Sequence[float]],
    bounds: Mapping[BenchmarkCase, TimeBound] | None = None,
) -> dict[str, Any]:
    """The JSON object of this command, which has run since `started`. Rates are in tokens per
    second, memory in bytes, times in seconds. bounds: lower bounds on the time of the cases; None
    for those of one process.
    """
    plan = inputs.plan
    entry_bytes = programs["lowlat"]["cache_bytes_per_token"]
    if bounds is None:
        bounds = {
            case: time_bound(
                inputs.config,
                case,
                dtype=plan.dtype,
                weights=inputs.weights,
                cache=plan.cache,
                rates=median_rates(rates),
            )
            for case in plan.cases
        }
    return {
        "format": FORMAT,
        "command": shlex.join(["lowlat", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": time.time() - started,
        "machine": describe_machine(),
        "model": _model(inputs.model, inputs.config, entry_bytes),
        "plan": {**asdict(plan), "peers": [peer.name for peer in plan.peers]},
        "programs": dict(programs),
        "calibration": {"median": median_rates(rates), "rounds": list(rates)},
        "rows": [_row(row, bounds[row.case], rows) for row in rows],
        "start_to_first_token": {
            name: {"seconds": statistics.median(taken), "samples": list(taken)}
            for name, taken in starts.items()
        },
    }


def best_peer(rows: Sequence[CaseResult], case: BenchmarkCase) -> CaseResult | None:
    """The fastest peer on a case."""
    peers = [row for row in rows if row.case == case and row.program != "lowlat" and row.samples]
    return max(peers, key=lambda row: row.median or 0.0, default=None)


def _model(model: Path, config: ModelConfig, entry_bytes: int) -> dict[str, Any]:
    count = count_parameters(config)
    return {
        "path": str(model),
        "model_type": config.model_type,
        "parameters": count.total,
        "active_parameters": count.active_without_embedding,
        "cache_bytes_per_token": entry_bytes,
    }


def _row(row: CaseResult, bound: TimeBound, rows: Sequence[CaseResult]) -> dict[str, Any]:
    best = best_peer(rows, row.case) if row.program == "lowlat" else None
    median = row.median
    tokens = row.case.tokens if row.case.kind == "prefill" else 1
    overlapped, serial = bound.overlapped / tokens, bound.serial / tokens
    return {
        "program": row.program,
        "kind": row.case.kind,
        "tokens": row.case.tokens,
        "tokens_per_second": median,
        "spread": row.spread,
        "roofline_tokens_per_second": 1 / overlapped,
        "share_of_roofline": None if median is None else median * overlapped,
        "share_of_serial_bound": None if median is None else median * serial,
        "bound_seconds": asdict(bound),
        "best_peer": None if best is None else best.program,
        "ratio_to_best_peer": median / best.median if median and best and best.median else None,
        "peak_bytes": row.peak_bytes,
        "not_measured": row.reason,
        "samples": [asdict(sample) for sample in row.samples],
    }


def describe_machine() -> dict[str, Any]:
    """The "machine" object of benchmark results."""
    cpu = processor()
    return {
        "cpu": cpu.model,
        "flags": cpu.flags,
        "isa": native.level() if native.available() else "plain PyTorch",
        "cores": native.processors(),
        "topology": str(machine_topology()),
        "memory_bytes": physical_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "commit": commit(),
    }


def commit() -> str | None:
    """Commit of the source tree, with "+changes" if files differ; None outside a Git checkout."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        name = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}+changes" if changed else name


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout.strip()
