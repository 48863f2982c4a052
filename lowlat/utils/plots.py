"""How lowlat's pictures look. Importing it needs no matplotlib."""

from typing import Any

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
"""Okabe and Ito's, which colour-blind readers tell apart, and a grey."""
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.alpha": 0.25,
    "svg.hashsalt": "lowlat",
}
"""matplotlib's settings; the salt makes the same picture the same bytes."""
