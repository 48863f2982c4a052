"""Plot panels of training runs: losses, rewards, pass@k, values per step, expert balance, routing
bias, heat maps of expert loads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lowlat.train.metrics.formatting import tick
from lowlat.train.metrics.jsonl import RunHistory
from lowlat.train.metrics.record import EvalRecord, ExpertRecord, StepRecord
from lowlat.train.metrics.series import Array, LoadMap, finite, medians, smoothed, thinned
from lowlat.utils.plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY

COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK)
_FAINT = {"alpha": 0.25, "linewidth": 0.6}
_MOST_NAMED_LAYERS = 8
_MOST_MARKED_EVALUATIONS = 60
_NAMED_PHASE = 0.02
"""Share of the x axis that the name of a phase needs."""
_MOST_RELATIVE_LOAD = 2.0
"""Load over mean load at which the colour saturates."""
_ROWS_OF_SCALE = 2
"""Rows of maps that the colour bar spans."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnRun:
    """A run with its label, colour and x axis."""

    label: str
    """Name in legends."""
    colour: str
    """Colour if several runs are drawn."""
    history: RunHistory
    x: Array
    """Positions of its steps on the x axis: steps if alone, else tokens."""
    alone: bool
    """Whether it is the only run, so that colours can distinguish its curves."""

    def values(self, value: Callable[[StepRecord], float | None]) -> Array:
        """`value` of every step, with NaN for None."""
        return finite([value(step) for step in self.history.steps])

    def named(self, name: str) -> str:
        """Legend of the curve `name`."""
        return name if self.alone else f"{self.label}: {name}"


def losses(axes: Any, runs: list[DrawnRun]) -> None:
    """Training loss per step (faint) and smoothed, MTP losses (dashed), evaluations (markers)."""
    means = []
    for run in runs:
        raw = run.values(lambda step: step.loss)
        means.append(smoothed(raw))
        x, faint, mean = thinned(run.x, raw, means[-1])
        axes.plot(x, faint, color=run.colour, **_FAINT)
        axes.plot(x, mean, color=run.colour, label=run.named("train"))
        means += _mtp_losses(axes, run)
        _evaluations(axes, run, lambda e: e.loss)
    _finish(axes, runs, "loss, nats per token")
    _leave_out_the_fall(axes, means)
    if runs[0].alone:
        _phases(axes, runs[0])
    axes.legend(loc="upper right", ncols=1 if len(runs) < 4 else 2)


def curve(
    axes: Any,
    runs: list[DrawnRun],
    title: str,
    value: Callable[[StepRecord], float | None],
    *,
    noisy: bool = False,
) -> None:
    """One value per step; if `noisy`, faint, with its moving median."""
    for run in runs:
        raw = run.values(value)
        x, points = thinned(run.x, raw)
        if noisy:
            axes.plot(x, points, color=run.colour, **_FAINT)
        axes.plot(x, medians(raw) if noisy else points, color=run.colour)
    _finish(axes, runs, title)
    axes.yaxis.set_major_formatter(tick)
    if not any(np.isfinite(run.values(value)).any() for run in runs):
        axes.text(0.5, 0.5, "unknown", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])


def rewards(axes: Any, runs: list[DrawnRun]) -> None:
    """Mean reward of the completions of GRPO steps, with the phases of a single run."""
    curve(axes, runs, "mean reward", of_rollouts("reward"), noisy=True)
    if runs[0].alone:
        _phases(axes, runs[0])


def of_rollouts(name: str, factor: float = 1.0) -> Callable[[StepRecord], float | None]:
    """A field of the rollouts of a step, times `factor`; None for steps without it."""

    def value(step: StepRecord) -> float | None:
        own = None if step.rollouts is None else getattr(step.rollouts, name)
        return None if own is None else factor * own

    return value


def pass_at_k(axes: Any, runs: list[DrawnRun]) -> None:
    """pass@k of evaluations on held-out prompts: each k of one run, the first k of several."""
    for run in runs:
        found = [e.pass_at_k for e in run.history.evaluations if e.pass_at_k is not None]
        ks = list(dict.fromkeys(k for each in found for k in each.pass_at))
        for k, colour in zip(ks if run.alone else ks[:1], _shades(len(ks)), strict=False):
            _evaluations(axes, run, partial(_passing, k), name=f"pass@{k}", colour=colour)
    _finish(axes, runs, "pass@k on held-out prompts")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _passing(k: str, evaluation: EvalRecord) -> float | None:
    figures = evaluation.pass_at_k
    return None if figures is None else figures.pass_at.get(k)


def is_taught(run: DrawnRun) -> bool:
    """Whether the run distills a teacher."""
    return any(s.divergence is not None or s.layer_error is not None for s in run.history.steps)


def divergence(axes: Any, runs: list[DrawnRun]) -> None:
    """KL divergence from the teacher: steps, and evaluations as markers."""
    title = "KL from the teacher, nats per token"
    curve(axes, runs, title, lambda s: s.divergence, noisy=True)
    for run in runs:
        _evaluations(axes, run, lambda e: e.divergence)
    log_scale(axes)


def log_scale(axes: Any) -> None:
    """Set a logarithmic y axis with labels at 1, 2 and 5 times powers of ten; linear without
    positive values.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    if not np.isfinite(axes.dataLim.minposy):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(tick)


def balance(
    axes: Any, runs: list[DrawnRun], title: str, value: Callable[[ExpertRecord], float]
) -> None:
    """An expert statistic: per layer for one run, the mean of layers for several."""
    for run in runs:
        layers = _of_layers(run, value)
        if run.alone:
            for (layer, values), colour in zip(layers.items(), _shades(len(layers)), strict=True):
                axes.plot(*thinned(run.x, smoothed(values)), color=colour, label=f"layer {layer}")
        elif layers:
            mean = smoothed(np.mean(list(layers.values()), axis=0))
            axes.plot(*thinned(run.x, mean), color=run.colour)
    _finish(axes, runs, title)
    if runs[0].alone:
        _layer_legend(axes)


def bias(axes: Any, runs: list[DrawnRun]) -> None:
    """Smallest and largest routing bias: per layer for one run, of all layers for several."""
    for run in runs:
        low = _of_layers(run, lambda e: e.bias_min)
        high = _of_layers(run, lambda e: e.bias_max)
        if run.alone:
            for layer, colour in zip(low, _shades(len(low)), strict=True):
                x, least, most = thinned(run.x, low[layer], high[layer])
                axes.plot(x, least, color=colour)
                axes.plot(x, most, color=colour)
        elif low:
            least = np.min(list(low.values()), axis=0)
            most = np.max(list(high.values()), axis=0)
            x, least, most = thinned(run.x, least, most)
            axes.fill_between(x, least, most, color=run.colour, alpha=0.2, linewidth=0)
            axes.plot(x, least, color=run.colour, linewidth=0.8)
            axes.plot(x, most, color=run.colour, linewidth=0.8)
    _finish(axes, runs, "routing bias, smallest and largest")


def draw_maps(figure: Any, panels: list[Any], maps: list[LoadMap]) -> None:
    """Heat maps of expert loads on the axes `panels`, with one colour bar: white is the mean load,
    orange above, purple below.
    """
    from matplotlib.ticker import MaxNLocator

    mesh = None
    for axes, layer in zip(panels, maps, strict=True):
        experts = np.arange(layer.relative.shape[0] + 1) - 0.5
        mesh = axes.pcolormesh(
            layer.edges,
            experts,
            layer.relative,
            cmap="PuOr_r",
            vmin=0.0,
            vmax=_MOST_RELATIVE_LOAD,
            rasterized=True,
        )
        axes.set(title=f"layer {layer.layer}: load of experts", xlabel="step", ylabel="expert")
        _label_positions(axes)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(False)
    if mesh is not None:
        rows = len({axes.get_subplotspec().rowspan.start for axes in panels})
        shrink = min(1.0, _ROWS_OF_SCALE / rows)
        bar = figure.colorbar(
            mesh, ax=panels, extend="max", aspect=25, pad=0.01, shrink=shrink, anchor=(0.0, 1.0)
        )
        bar.set_label("load / mean load", fontsize=9)
        bar.set_ticks([0.0, 0.5, 1.0, 1.5, 2.0])


def _mtp_losses(axes: Any, run: DrawnRun) -> list[Array]:
    """Draw the MTP losses; returns their moving means."""
    means = []
    for depth in range(max(len(step.mtp_losses) for step in run.history.steps)):
        values = [
            step.mtp_losses[depth] if depth < len(step.mtp_losses) else None
            for step in run.history.steps
        ]
        means.append(smoothed(finite(values)))
        axes.plot(
            *thinned(run.x, means[-1]),
            "--" if depth == 0 else ":",
            color=COLOURS[2] if run.alone else run.colour,
            linewidth=1.0,
            label=run.named(f"train, MTP module {depth + 1}"),
        )
    return means


def _evaluations(
    axes: Any,
    run: DrawnRun,
    value: Callable[[EvalRecord], float | None],
    *,
    name: str | None = None,
    colour: Any = COLOURS[1],
) -> None:
    """`value` of the evaluations of each split that has it; name: legend, by default the split;
    colour: of a single run.
    """
    known = [e for e in run.history.evaluations if value(e) is not None]
    for place, split in enumerate(dict.fromkeys(e.split for e in known)):
        records = [e for e in known if e.split == split]
        axes.plot(
            [e.step if run.alone else e.tokens for e in records],
            finite([value(e) for e in records]),
            "-",
            marker="o^sD"[place % 4] if len(records) <= _MOST_MARKED_EVALUATIONS else "",
            color=colour if run.alone else run.colour,
            linewidth=0.9,
            markersize=4,
            markerfacecolor="white",
            label=run.named(name or split),
        )


def _leave_out_the_fall(axes: Any, means: list[Array]) -> None:
    """Limit the y axis to the values after the first twentieth of the run, whose fast initial drop
    would flatten the rest.
    """
    rest = np.concatenate([mean[len(mean) // 20 :] for mean in means])
    rest = rest[np.isfinite(rest)]
    bottom = axes.dataLim.y0
    if len(rest) and np.isfinite(bottom) and rest.max() > bottom:
        margin = 0.04 * (rest.max() - bottom)
        axes.set_ylim(bottom - margin, rest.max() + margin)


def _phases(axes: Any, run: DrawnRun) -> None:
    """A line at the start of each phase, with its name if it fits; none for a single phase."""
    steps = run.history.steps
    begins = [
        (x, step.phase)
        for place, (x, step) in enumerate(zip(run.x, steps, strict=True))
        if place == 0 or steps[place - 1].phase != step.phase
    ]
    if len(begins) == 1:
        return
    ends = [x for x, _ in begins[1:]] + [run.x[-1]]
    for (x, phase), end in zip(begins, ends, strict=True):
        axes.axvline(x, color="grey", linestyle=":", linewidth=0.9)
        if end - x > _NAMED_PHASE * (run.x[-1] - run.x[0]):
            axes.text(
                x,
                0.01,
                f" {phase}",
                color="grey",
                fontsize=8,
                rotation="vertical",
                va="bottom",
                transform=axes.get_xaxis_transform(),
            )


def _of_layers(run: DrawnRun, value: Callable[[ExpertRecord], float]) -> dict[int, Array]:
    """`value` of every MoE layer and step; NaN if a step has no record of the layer."""
    layers = dict.fromkeys(e.layer for step in run.history.steps for e in step.experts)
    curves = {layer: np.full(len(run.x), np.nan) for layer in sorted(layers)}
    for place, step in enumerate(run.history.steps):
        for record in step.experts:
            curves[record.layer][place] = value(record)
    return curves


def _shades(number: int) -> list[Any]:
    """Colours of layers in their order, from dark to bright."""
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0.0, 0.9, number)]


def _layer_legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > _MOST_NAMED_LAYERS:
        handles, labels = [handles[0], handles[-1]], [labels[0], labels[-1]]
    if handles:
        axes.legend(handles, labels)


def _finish(axes: Any, runs: list[DrawnRun], title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step" if runs[0].alone else "tokens")
    _label_positions(axes)
    axes.margins(x=0.01)


def _label_positions(axes: Any) -> None:
    """Ticks of the x axis, steps or tokens."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(tick)
