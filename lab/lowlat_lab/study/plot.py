"""Plot of a study: every variant's loss minus the baseline's, or its expert load balance; of the
attention study also loss over KV cache bytes and over decode time.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowlat.train.metrics.formatting import count
from lowlat.utils.errors import UserError
from lowlat.utils.plots import BLACK, BLUE, GREY, STYLE
from lowlat_lab.study.report import Report, find_comparison
from lowlat_lab.study.statistics import confidence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, ROW_HEIGHT, MARGIN = 7.0, 0.42, 1.3
"""Size of the figure in inches: its width, a variant's row, and title and axis together."""

PANEL_WIDTH, PANEL_HEIGHT = 4.2, 3.8
"""A panel of the attention study."""

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
    if report["study"] == "attention":
        with matplotlib.rc_context(STYLE):
            _draw_costs(report, variants).savefig(path, metadata=_metadata(path))
        return
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
        figure.savefig(path, metadata=_metadata(path))


def _metadata(path: Path) -> dict[str, None] | None:
    """Without the date, so that equal figures give equal files."""
    return {"Date": None} if path.suffix == ".svg" else None


def _draw_costs(report: Report, variants: list[Variant]) -> "Figure":
    """Loss minus the baseline's, over KV cache bytes and over decode time at each context."""
    from matplotlib.figure import Figure

    base = report["variants"][0]
    contexts = sorted({time["context"] for each in variants for time in each["decode"]})
    figure = Figure(figsize=(PANEL_WIDTH * (1 + len(contexts)), PANEL_HEIGHT), layout="constrained")
    panels = figure.subplots(1, 1 + len(contexts), sharey=True, squeeze=False)[0]
    costs = [{each["name"]: (each["cache_bytes_per_token"], True) for each in variants}]
    costs += [_times(variants, context) for context in contexts]
    units = ["KV cache, bytes per token"]
    units += [f"decode at {context:,} tokens, ms" for context in contexts]
    for axes, cost, unit in zip(panels, costs, units, strict=True):
        for each in variants:
            found = find_comparison(report, each["name"], base["name"])
            if each["name"] not in cost or (found is None and each is not base):
                continue
            value = {"mean": 0.0, "half": None} if found is None else found["difference"]
            place, is_measured = cost[each["name"]]
            axes.errorbar(
                place,
                value["mean"],
                yerr=value["half"] or 0.0,
                fmt="o",
                color=BLUE,
                markerfacecolor=BLUE if is_measured else "none",
                capsize=3,
            )
            axes.annotate(
                each["label"],
                (place, value["mean"]),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize="small",
            )
        axes.axhline(0.0, color=BLACK, linewidth=0.8)
        axes.set(xlabel=unit, xscale="log")
    panels[0].set_ylabel(f"held-out loss minus {base['label']}, nats per token")
    figure.suptitle(f"{_setting(report)}; hollow: roofline, not measured", fontsize="small")
    return figure


def _times(variants: list[Variant], context: int) -> dict[str, tuple[float, bool]]:
    """Decode milliseconds at `context`, and whether they are measured."""
    return {
        each["name"]: (time["milliseconds"], time["is_measured"])
        for each in variants
        for time in each["decode"]
        if time["context"] == context
    }


def _differences(report: Report, variants: list[Variant]) -> list[Row]:
    """Every variant but the baseline."""
    base = report["variants"][0]["name"]
    rows: list[Row] = []
    for variant in variants:
        found = find_comparison(report, variant["name"], base)
        if found is None:
            continue
        rows.append((variant["label"], found["difference"]))
    return rows


def _setting(report: Report) -> str:
    tokens = count(report["tokens"])
    seeds = max((len(variant["runs"]) for variant in report["variants"]), default=0)
    return f"{tokens} tokens, {seeds} seeds, {confidence()} intervals"
