"""Heat maps of expert loads over training: white is the mean load, orange above, purple below."""

from typing import Any

import numpy as np

from lowlat.train.metrics.formatting import tick
from lowlat.train.metrics.series import LoadMap

_MOST = 2.0
"""Load over mean load at which the colour saturates."""
_ROWS_OF_SCALE = 2
"""Rows of maps that the colour bar spans."""


def draw_maps(figure: Any, panels: list[Any], maps: list[LoadMap]) -> None:
    """Draw each of `maps` on its axes of `panels`, with one colour bar for all."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    mesh = None
    for axes, layer in zip(panels, maps, strict=True):
        experts = np.arange(layer.relative.shape[0] + 1) - 0.5
        mesh = axes.pcolormesh(
            layer.edges,
            experts,
            layer.relative,
            cmap="PuOr_r",
            vmin=0.0,
            vmax=_MOST,
            rasterized=True,
        )
        axes.set(title=f"layer {layer.layer}: load of experts", xlabel="step", ylabel="expert")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
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
