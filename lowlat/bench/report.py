"""The report of a run: one JSON object with every sample, and the figures derived from them."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowlat.bench.measure import Row, median_rates
from lowlat.bench.plan import Cell, Plan
from lowlat.bench.roofline import Least, least_seconds
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import count_parameters

FORMAT = 1
"""Version of the JSON object."""


def build(
    *,
    command: str,
    started: float,
    machine: dict[str, Any],
    model: Path,
    config: ModelConfig,
    plan: Plan,
    precisions: Mapping[str, str],
    facts: Mapping[str, dict[str, Any]],
    differences: Mapping[str, float],
    errors: Mapping[str, float],
    rows: Sequence[Row],
    rates: Sequence[dict[str, float]],
    starts: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """The object. Rates are tokens per second, memory bytes, times seconds."""
    row_bytes = facts["lowlat"]["cache_bytes_per_token"]
    least = {
        cell: least_seconds(
            config,
            cell,
            dtype=plan.dtype,
            cache=plan.cache,
            row_bytes=row_bytes,
            rates=median_rates(rates),
        )
        for cell in plan.cells
    }
    return {
        "format": FORMAT,
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": time.time() - started,
        "machine": machine,
        "model": _model(model, config, row_bytes),
        "plan": {**asdict(plan), "peers": [peer.name for peer in plan.peers]},
        "programs": {
            name: {
                "precision": precision,
                "fp32_difference": differences.get(name),
                "error_against_fp32": errors.get(name),
                **facts.get(name, {}),
            }
            for name, precision in precisions.items()
        },
        "calibration": {"median": median_rates(rates), "rounds": list(rates)},
        "rows": [_row(row, least[row.cell], rows) for row in rows],
        "start_to_first_token": {
            name: {"seconds": statistics.median(taken), "samples": list(taken)}
            for name, taken in starts.items()
        },
    }


def best_peer(rows: Sequence[Row], cell: Cell) -> Row | None:
    """The fastest program but lowlat on a cell."""
    peers = [row for row in rows if row.cell == cell and row.program != "lowlat" and row.samples]
    return max(peers, key=lambda row: row.median or 0.0, default=None)


def _model(model: Path, config: ModelConfig, row_bytes: int) -> dict[str, Any]:
    count = count_parameters(config)
    return {
        "path": str(model),
        "model_type": config.model_type,
        "parameters": count.total,
        "active_parameters": count.active_without_embedding,
        "cache_bytes_per_token": row_bytes,
    }


def _row(row: Row, least: Least, rows: Sequence[Row]) -> dict[str, Any]:
    best = best_peer(rows, row.cell) if row.program == "lowlat" else None
    median = row.median
    return {
        "program": row.program,
        "kind": row.cell.kind,
        "tokens": row.cell.tokens,
        "tokens_per_second": median,
        "spread": row.spread,
        "roofline_tokens_per_second": 1 / least.together,
        "share_of_roofline": None if median is None else median * least.together,
        "share_in_turn": None if median is None else median * least.in_turn,
        "best_peer": None if best is None else best.program,
        "ratio_to_best_peer": median / best.median if median and best and best.median else None,
        "peak_bytes": row.peak_bytes,
        "not_measured": row.reason,
        "samples": [asdict(sample) for sample in row.samples],
    }
