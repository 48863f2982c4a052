"""Plot of a study: every variant's loss minus the baseline's, or its expert load balance."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowlat.train.metrics.formatting import count
from lowlat.utils.errors import UserError
from lowlat.utils.plots import BLACK, BLUE, GREY, STYLE
from lowlat_lab.study.report import Report, find_comparison
from lowlat_lab.study.statistics import confidence

WIDTH, ROW_HEIGHT, MARGIN = 7.0, 0.42, 1.3
"""Size of the figure in inches: its width, a variant's row, and title and axis together."""

Variant = dict[str, Any]
Row = tuple[str, dict[str, Any]]
"""Label of a variant, and its interval: mean and half width."""


def require_matplotlib() -> None:
    """Raises UserError without matplotlib; called before an hour of training."""
    if find_spec("matplotlib") is None:
        raise UserError("a study draws a plot and needs matplotlib; install lowlat[train]")


def draw(report: Report, path: Path) -> None:
    """Write the plot; the suffix of `path` selects the format (svg, png, pdf)."""
    import matplotlib
    from matplotlib.figure import Figure

    variants = [variant for variant in report["variants"] if "loss" in variant]
    if report["study"] == "balance":
        rows = [(each["label"], each["train_max_violations_mean"]) for each in variants]
        title, unit = "Imbalance of expert load", "MaxVio in the last steps; 0 is perfect balance"
    else:
        rows = _differences(report, variants)
        base = report["variants"][0]["label"]
        title, unit = f"Difference of held-out loss (baseline: {base})", "nats per token"
    with matplotlib.rc_context(STYLE):
        size = WIDTH, MARGIN + ROW_HEIGHT * len(rows)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for place, (_, value) in enumerate(rows):
            half = value["half"] or 0.0
            axes.errorbar(value["mean"], place, xerr=half, fmt="o", color=BLUE, capsize=3)
        axes.axvline(0.0, color=BLACK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
        axes.set(title=title, xlabel=unit)
        axes.text(1.0, 1.01, _setting(report), transform=axes.transAxes, ha="right", color=GREY)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _differences(report: Report, variants: list[Variant]) -> list[Row]:
    """Every variant but the baseline; attention variants with their cache size."""
    base = report["variants"][0]["name"]
    rows: list[Row] = []
    for variant in variants:
        found = find_comparison(report, variant["name"], base)
        if found is None:
            continue
        size = variant.get("cache_bytes_per_token")
        label = variant["label"] if size is None else f"{variant['label']}, {size:,} bytes/token"
        rows.append((label, found["difference"]))
    return rows


def _setting(report: Report) -> str:
    tokens, seeds = count(report["tokens"]), len(report["seeds"])
    return f"{tokens} tokens, {seeds} seeds, {confidence()} intervals"
