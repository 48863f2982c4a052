"""Table of run summaries, side by side, for `lowlat train report`."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from lowlat.train.metrics.formatting import clock, count, memory, rate, utilisation
from lowlat.train.metrics.summary import Summary


def table(summaries: dict[str, Summary]) -> Table:
    """One column per run, one row per value that any run has."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold cyan")
    shown.add_column("", no_wrap=True)
    for label in summaries:
        shown.add_column(label, justify="right", overflow="fold")
    runs = list(summaries.values())
    for name, cells in [*_course(runs), *_losses(runs), *_speed(runs), *_experts(runs)]:
        if any(cells):
            shown.add_row(name, *cells)
    return shown


Row = tuple[str, list[str]]


def _course(runs: list[Summary]) -> list[Row]:
    return [
        ("steps", [f"{run['step']:,} of {run['total_steps']:,}" for run in runs]),
        ("tokens", [f"{count(run['tokens'])} of {count(run['tokens_total'])}" for run in runs]),
        ("time", [clock(run["seconds"]) for run in runs]),
        ("times started", [str(run["runs"]) if run["runs"] > 1 else "" for run in runs]),
    ]


def _losses(runs: list[Summary]) -> list[Row]:
    """Losses in nats per target; evaluations are those with the lowest main loss."""
    rows = [("loss at the end", [_figure(run, "loss", ".4f") for run in runs])]
    for name, key in (
        ("  KL from the teacher", "divergence"),
        ("  error of layers", "layer_error"),
    ):
        rows.append((name, [_figure(run, key, ".4f") for run in runs]))
    for depth in range(max(len(run["mtp_losses"]) for run in runs)):
        rows.append(
            (
                f"  MTP module {depth + 1}",
                [_at(run["mtp_losses"], depth) for run in runs],
            )
        )
    for split in dict.fromkeys(split for run in runs for split in run["evaluations"]):
        best = [run["evaluations"].get(split, {"best": None})["best"] for run in runs]
        rows += [
            (f"best {split} loss", [_figure(e, "loss", ".4f") for e in best]),
            ("  per", [(e or {}).get("targets") or "" for e in best]),
            ("  bits per byte", [_figure(e, "bits_per_byte", ".4f") for e in best]),
            ("  KL from the teacher", [_figure(e, "divergence", ".4f") for e in best]),
            ("  at step", [_figure(e, "step", ",") for e in best]),
        ]
        for depth in range(max(len(e["mtp_losses"]) if e else 0 for e in best)):
            cells = [_at(e["mtp_losses"], depth) if e else "" for e in best]
            rows.append((f"  MTP module {depth + 1}", cells))
    return rows


def _speed(runs: list[Summary]) -> list[Row]:
    overall = [run["tokens_per_second_overall"] for run in runs]
    return [
        ("speed of steps", [rate(run["tokens_per_second"]) for run in runs]),
        ("  with evaluations", ["" if speed is None else rate(speed) for speed in overall]),
        ("MFU", ["" if run["mfu"] is None else utilisation(run["mfu"]) for run in runs]),
        ("most memory", [memory(run["memory_bytes"]) for run in runs]),
    ]


def _experts(runs: list[Summary]) -> list[Row]:
    """MaxVio at the first step and at the end, and the highest of any layer and step."""
    return [
        ("MaxVio, mean of layers", [_violation(run, statistics.fmean) for run in runs]),
        ("  worst layer", [_violation(run, max) for run in runs]),
        ("  highest in between", [_highest(run) for run in runs]),
    ]


def _at(losses: Sequence[float], depth: int) -> str:
    return f"{losses[depth]:.4f}" if depth < len(losses) else ""


def _figure(figures: dict[str, Any] | None, name: str, form: str) -> str:
    if figures is None or figures[name] is None:
        return ""
    return format(figures[name], form)


def _violation(run: Summary, over: Callable[[list[float]], float]) -> str:
    if not run["experts"]:
        return ""
    first = over([layer["max_violation_first"] for layer in run["experts"]])
    last = over([layer["max_violation_last"] for layer in run["experts"]])
    return f"{first:.2f} -> {last:.2f}"


def _highest(run: Summary) -> str:
    highest = [layer["max_violation_highest"] for layer in run["experts"]]
    return f"{max(highest):.2f}" if highest else ""
