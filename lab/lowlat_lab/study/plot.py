"""Plot of a study: held-out losses, and their differences from the baseline."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowlat.train.metrics.formatting import count
from lowlat.utils.errors import UserError
from lowlat.utils.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE
from lowlat_lab.study.report import Report, find_comparison
from lowlat_lab.study.statistics import confidence

COLOURS = (BLACK, SKY, BLUE, ORANGE, RED, GREEN, PINK, GREY)
MARKERS = "osDv^P*X"
ASIDE = 1.1
"""Factor between the x positions of variants with equal cache sizes, so that none is hidden."""
LABEL_SPACE = 0.16
"""Share of the height for labels above the highest point."""
LOADS = (
    (-0.1, "train_max_violations", "o", "last steps"),
    (0.1, "max_violations", "s", "held-out text"),
)
"""Offset from the variant's position, key, marker and label of each kind of MaxVio."""

Variant = dict[str, Any]


def require_matplotlib() -> None:
    """Raises UserError without matplotlib; called before an hour of training."""
    if find_spec("matplotlib") is None:
        raise UserError("a study draws a plot and needs matplotlib; install lowlat[train]")


def draw(report: Report, path: Path) -> None:
    """Write the plot; the suffix of `path` selects the format (svg, png, pdf)."""
    import matplotlib
    from matplotlib.figure import Figure

    variants = [variant for variant in report["variants"] if "loss" in variant]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        if report["study"] == "attention":
            _over_cache(left, report, variants, differences=False)
            _over_cache(right, report, variants, differences=True)
        else:
            _in_rows(left, report, variants, differences=False)
            if report["study"] == "balance":
                _loads(right, variants)
            else:
                _in_rows(right, report, variants, differences=True)
        size = report["size"]
        figure.suptitle(
            f"{size['num_hidden_layers']} layers of {size['hidden_size']}, "
            f"{count(report['tokens'])} tokens per run, {len(report['seeds'])} seeds, "
            f"bars: {confidence()} confidence",
            fontsize=10,
        )
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _over_cache(axes: Any, report: Report, variants: list[Variant], *, differences: bool) -> None:
    places = _spread_positions(variants)
    for index, (variant, place) in enumerate(zip(variants, places, strict=True)):
        value = _value(report, variant, differences)
        if value is None:
            continue
        colour = COLOURS[index % len(COLOURS)]
        axes.errorbar(
            place,
            value["mean"],
            yerr=value["half"] or 0.0,
            fmt=MARKERS[index % len(MARKERS)],
            color=colour,
            capsize=3,
            markersize=7,
        )
        axes.annotate(
            variant["label"],
            (place, value["mean"] + (value["half"] or 0.0)),
            xytext=(0, 8),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            rotation=90,
            ha="center",
            va="bottom",
        )
        if not differences:
            losses = [run["loss"] for run in variant["runs"]]
            axes.plot([place] * len(losses), losses, "_", color=colour, alpha=0.6, markersize=9)
    axes.set_xscale("log", base=2)
    ticks = sorted({variant["cache_bytes_per_token"] for variant in variants})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False, rotation=90)
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + LABEL_SPACE * (high - low))
    axes.set_xlabel("KV cache per token, bytes (bf16; equal sizes side by side)")
    _name(axes, report, differences)


def _in_rows(axes: Any, report: Report, variants: list[Variant], *, differences: bool) -> None:
    for index, variant in enumerate(variants):
        value = _value(report, variant, differences)
        if value is not None:
            axes.errorbar(
                index,
                value["mean"],
                yerr=value["half"] or 0.0,
                fmt=MARKERS[index],
                color=COLOURS[index],
                capsize=3,
                markersize=7,
            )
    _label_variants(axes, variants)
    _name(axes, report, differences)


def _loads(axes: Any, variants: list[Variant]) -> None:
    for index, variant in enumerate(variants):
        for shift, key, marker, name in LOADS:
            value = variant[f"{key}_mean"]
            axes.errorbar(
                index + shift,
                value["mean"],
                yerr=value["half"] or 0.0,
                fmt=marker,
                color=COLOURS[index],
                capsize=3,
                label=None if index else name,
            )
    _label_variants(axes, variants)
    axes.set(ylabel="MaxVio, mean over layers", title="Expert load balance: 0 is perfect")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _label_variants(axes: Any, variants: list[Variant]) -> None:
    axes.set_xticks(range(len(variants)), [variant["label"] for variant in variants])
    axes.set_xlim(-0.5, len(variants) - 0.5)


def _name(axes: Any, report: Report, differences: bool) -> None:
    base = report["variants"][0]["label"]
    if differences:
        axes.axhline(0.0, color="black", linewidth=0.8, alpha=0.6)
        axes.set(ylabel="nats per token", title=f"Loss minus {base}, paired by seed")
    else:
        axes.set(ylabel="nats per token", title="Held-out loss")


def _value(report: Report, variant: Variant, differences: bool) -> dict[str, Any] | None:
    """The plotted value of a variant: its loss, or its loss minus the baseline's."""
    if not differences:
        return variant["loss"]
    if variant is report["variants"][0]:
        return {"mean": 0.0, "half": None}
    found = find_comparison(report, variant["name"], report["variants"][0]["name"])
    return None if found is None else found["difference"]


def _spread_positions(variants: list[Variant]) -> list[float]:
    """X positions: the cache size; variants of equal size follow to the right."""
    sizes = [variant["cache_bytes_per_token"] for variant in variants]
    places = []
    for index, size in enumerate(sizes):
        same = [other for other in range(len(sizes)) if sizes[other] == size]
        places.append(size * ASIDE ** same.index(index))
    return places
