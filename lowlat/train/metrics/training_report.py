"""Reports of training runs: the table of summaries, plots and report.json."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lowlat.train.metrics.formatting import clock, count, memory, rate, utilisation
from lowlat.train.metrics.jsonl import LOG_NAME, RunHistory, read_log
from lowlat.train.metrics.lines import plain
from lowlat.train.metrics.plot import FORMATS, draw
from lowlat.train.metrics.summary import Summary, summarise
from lowlat.utils.errors import UserError

REPORT_STEM = "report"
"""Name of report files, next to the log of their run."""


def read_runs(runs: list[Path]) -> dict[str, RunHistory]:
    """The history of each run, given by its folder or its log, by a unique label. Raises UserError
    for a run that is named twice or has no readable log.
    """
    names = [run.resolve().name if run.is_dir() else run.resolve().parent.name for run in runs]
    labels = [
        name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{label}: named twice; name every run once")
    logs = [run / LOG_NAME if run.is_dir() else run for run in runs]
    return {label: read_log(log) for label, log in zip(labels, logs, strict=True)}


def pictures(out: Path) -> list[Path]:
    """Plot files of `--out`: the file itself, or a .png and an .svg without a suffix.

    Raises UserError for another suffix.
    """
    if not out.suffix:
        return [out.with_suffix(".png"), out.with_suffix(".svg")]
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out}: must end in {', '.join(FORMATS)}, or have no suffix")
    return [out]


def write_report(history: RunHistory) -> list[Path]:
    """Write report.png, report.svg and report.json of one run next to its log.

    Returns the files. Raises UserError without matplotlib, without a completed step, or if a file
    cannot be written.
    """
    folder = history.path.parent
    summary = summarise(history)
    files = pictures(folder / REPORT_STEM)
    draw({history.start.name: history}, files)
    return [*files, write_json(summary, folder / f"{REPORT_STEM}.json")]


def write_json(summary: Summary | dict[str, Summary], path: Path) -> Path:
    """Write `summary`, or several by label, as strict JSON to `path`; returns `path`. Raises
    UserError if writing fails.
    """
    text = json.dumps(plain(summary), allow_nan=False, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error.strerror})") from error
    return path


def table(summaries: dict[str, Summary]) -> Table:
    """One column per run, one row per value that any run has."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold cyan")
    shown.add_column("", no_wrap=True)
    for label in summaries:
        shown.add_column(label, justify="right", overflow="fold")
    runs = list(summaries.values())
    for name, cells in [
        *_course(runs),
        *_losses(runs),
        *_rollouts(runs),
        *_speed(runs),
        *_experts(runs),
    ]:
        if any(cells):
            shown.add_row(name, *cells)
    return shown


Row = tuple[str, list[str]]


def _course(runs: list[Summary]) -> list[Row]:
    return [
        ("steps", [f"{run['step']:,} of {run['total_steps']:,}" for run in runs]),
        ("tokens", [_tokens(run) for run in runs]),
        ("time", [clock(run["seconds"]) for run in runs]),
        ("times started", [str(run["runs"]) if run["runs"] > 1 else "" for run in runs]),
    ]


def _tokens(run: Summary) -> str:
    total = run["tokens_total"]
    return count(run["tokens"]) + ("" if total is None else f" of {count(total)}")


def _losses(runs: list[Summary]) -> list[Row]:
    """Losses in nats per target; evaluations are those with the lowest main loss."""
    rows = [
        ("loss at the end", [_figure(run, "loss", ".4f") for run in runs]),
        ("  KL from the teacher", [_figure(run, "divergence", ".4f") for run in runs]),
        ("  error of layers", [_figure(run, "layer_error", ".4f") for run in runs]),
        *_mtp_losses(runs),
    ]
    for split in dict.fromkeys(split for run in runs for split in run["evaluations"]):
        best = [run["evaluations"].get(split, {"best": None})["best"] for run in runs]
        rows += [
            (f"best {split} loss", [_figure(e, "loss", ".4f") for e in best]),
            *_pass_at_k(split, best),
            ("  per", [(e or {}).get("targets") or "" for e in best]),
            ("  bits per byte", [_figure(e, "bits_per_byte", ".4f") for e in best]),
            ("  KL from the teacher", [_figure(e, "divergence", ".4f") for e in best]),
            ("  at step", [_figure(e, "step", ",") for e in best]),
            *_mtp_losses(best),
        ]
    return rows


def _pass_at_k(split: str, best: Sequence[dict[str, Any] | None]) -> list[Row]:
    """One row per k, of the evaluations with the best pass@k of the first."""
    found = [((each or {}).get("pass_at_k") or {}).get("pass_at", {}) for each in best]
    return [
        (f"best {split} pass@{k}", [format(each[k], ".4f") if k in each else "" for each in found])
        for k in dict.fromkeys(k for each in found for k in each)
    ]


def _mtp_losses(figures: Sequence[dict[str, Any] | None]) -> list[Row]:
    """One row per MTP module."""
    losses = [() if each is None else each["mtp_losses"] for each in figures]
    return [
        (
            f"  MTP module {depth + 1}",
            [f"{each[depth]:.4f}" if depth < len(each) else "" for each in losses],
        )
        for depth in range(max(map(len, losses)))
    ]


def _rollouts(runs: list[Summary]) -> list[Row]:
    """GRPO, at the first step and at the end."""
    names = {
        "reward": "reward",
        "length": "  tokens per completion",
        "truncated": "  truncated completions",
        "no_signal": "  groups without signal",
        "entropy": "  entropy",
        "kl": "  KL from the reference",
        "clipped": "  clipped tokens",
    }
    return [
        (text, [_change(run["rollouts"], name) for run in runs]) for name, text in names.items()
    ]


def _change(rollouts: dict[str, Any], name: str) -> str:
    first, last = rollouts.get(f"{name}_first"), rollouts.get(f"{name}_last")
    return "" if first is None or last is None else f"{first:.4g} -> {last:.4g}"


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
