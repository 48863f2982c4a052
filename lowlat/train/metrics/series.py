"""Plot data of a run: smoothed and downsampled curves, expert loads averaged over intervals."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lowlat.train.metrics.jsonl import RunHistory
from lowlat.train.metrics.record import StepRecord

Array = np.ndarray[Any, np.dtype[np.float64]]

MOST_POINTS = 1500
"""Maximum points of a curve, more than a plot has pixel columns."""
MOST_STRETCHES = 160
"""Maximum columns of a map of loads."""
_SMOOTHED_PART = 40
"""Smoothing windows are 1 / this of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadMap:
    """Expert loads of one MoE layer over a run."""

    layer: int
    """Decoder layer."""
    edges: Array
    """[intervals + 1]: borders of the intervals on the x axis."""
    relative: Array
    """[experts, intervals]: load over mean load, averaged over an interval; 1 is balanced."""


def finite(values: list[float | None]) -> Array:
    """`values` as an array, with NaN for None, which plots omit."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def smoothed(values: Array) -> Array:
    """Centered moving average over a fortieth of the run, ignoring values that are not finite."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low, high = _windows(np.arange(len(values)), len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def medians(values: Array) -> Array:
    """Moving median over a fortieth of the run, at the points of `thinned`; robust against single
    outliers, such as a step during a checkpoint.
    """
    low, high = _windows(_kept(len(values)), len(values))
    windows = (values[i:j][np.isfinite(values[i:j])] for i, j in zip(low, high, strict=True))
    return np.array([np.median(window) if len(window) else np.nan for window in windows])


def thinned(*curves: Array) -> list[Array]:
    """Downsample each curve to every n-th point, at most MOST_POINTS, the last included."""
    kept = _kept(len(curves[0]))
    return [curve[kept] for curve in curves]


def _kept(length: int) -> Any:
    stride = -(-length // MOST_POINTS)
    return np.arange(length - 1, -1, -stride)[::-1]


def _windows(places: Any, length: int) -> tuple[Any, Any]:
    """First index and one past the last index of the window around each of `places`."""
    half = length // _SMOOTHED_PART // 2
    return np.maximum(places - half, 0), np.minimum(places + half + 1, length)


def load_maps(history: RunHistory, positions: Array) -> list[LoadMap]:
    """One map per MoE layer with logged loads; `positions` of the steps are on the x axis."""
    kept = [
        (position, step)
        for position, step in zip(positions, history.steps, strict=True)
        if any(layer.load for layer in step.experts)
    ]
    if not kept:
        return []
    groups = np.array_split(np.arange(len(kept)), min(MOST_STRETCHES, len(kept)))
    starts = [kept[group[0]][0] for group in groups]
    edges = np.array([*starts, max(positions[-1], starts[-1] + 1.0)], dtype=np.float64)
    layers = {layer.layer: len(layer.load) for layer in kept[0][1].experts if layer.load}
    maps = []
    for layer, experts in layers.items():
        columns = [_mean_load([kept[i][1] for i in group], layer, experts) for group in groups]
        relative = np.stack(columns, axis=1) * experts
        maps.append(LoadMap(layer=layer, edges=edges, relative=relative))
    return maps


def _mean_load(steps: list[StepRecord], layer: int, experts: int) -> Array:
    """Mean load of each expert of `layer`; NaN if no step logged it."""
    loads = [
        e.load
        for step in steps
        for e in step.experts
        if e.layer == layer and len(e.load) == experts
    ]
    return np.mean(loads, axis=0) if loads else np.full(experts, np.nan)
