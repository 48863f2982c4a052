"""Plot of the GRPO study: held-out pass@1 and training reward over steps, with intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowlat.utils.plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, STYLE
from lowlat_lab.rewards.report import Report, curve, reward_curve
from lowlat_lab.study.statistics import Interval, confidence

COLOURS = (BLUE, ORANGE, PINK, GREEN, RED, GREY)
WINDOW = 4
"""Steps whose rewards are averaged."""
LABEL_SPACE = 0.8
"""Width of the labels relative to that of the lines."""
LABEL_GAP = 0.055
"""Least distance of two labels, relative to the height of the panel."""


def draw(report: Report, path: Path) -> None:
    """Write the plot; the suffix of `path` selects the format."""
    import matplotlib
    from matplotlib.figure import Figure

    variants = [
        (f"{entry['model']}, {entry['task']}: {each['label']}", each)
        for entry in report["experiments"]
        for each in entry["variants"]
        if each["runs"]
    ][: len(COLOURS)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1 + LABEL_SPACE))
        ends = []
        for colour, (label, each) in zip(COLOURS, variants, strict=False):
            _line(left, curve(each), colour)
            points = reward_curve(each, window=WINDOW)
            _line(right, points, colour)
            if points:
                ends.append((points[-1][0], points[-1][1].mean, label, colour))
        _labels(right, ends)
        left.set(title="pass@1 on held-out prompts", xlabel="steps")
        right.set(title=f"training reward, mean of {WINDOW} steps", xlabel="steps")
        note = f"bands: {confidence()} confidence over seeds"
        right.text(1.0, 1.01, note, transform=right.transAxes, ha="right", color=GREY)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _line(axes: Any, points: Sequence[tuple[float, Interval]], colour: str) -> None:
    steps = [step for step, _ in points]
    means = [own.mean for _, own in points]
    halves = [own.half or 0.0 for _, own in points]
    axes.plot(steps, means, marker="o", markersize=3, color=colour)
    low = [mean - half for mean, half in zip(means, halves, strict=True)]
    high = [mean + half for mean, half in zip(means, halves, strict=True)]
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _labels(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name the lines right of their last points, from low to high without overlaps."""
    first, last = axes.get_xlim()
    axes.set_xlim(first, last + LABEL_SPACE * (last - first))
    bottom, top = axes.get_ylim()
    height = -1.0
    for x, y, label, colour in sorted(ends, key=lambda end: end[1]):
        height = max(y, height + LABEL_GAP * (top - bottom)) if height > -1.0 else y
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (x, height), color=colour, fontsize="small", **place)
