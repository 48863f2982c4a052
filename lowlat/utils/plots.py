"""Colours and matplotlib style of lowlat's plots; imports no matplotlib."""

from typing import Any

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
"""Palette of Okabe and Ito, safe for colour-blind readers, and a grey."""
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.alpha": 0.25,
    "svg.hashsalt": "lowlat",
}
"""rcParams; the salt makes SVG files reproducible."""
