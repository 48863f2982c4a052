"""Figures of a run as people read them. Owns number formats, shared by views, tables and plots."""

import math
from collections.abc import Sequence

_SIZES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
BUSY = "rate measured while busy"
"""Why a share of the measured rate of products can exceed 1: something else ran meanwhile."""
_BARS = "▁▂▃▄▅▆▇█"


def clock(seconds: int | float | None) -> str:
    """'0:07', '12:34', '3:45:10', '2 d 03:45'; '?' if not known."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def count(n: int | float) -> str:
    """'512', '12.3K', '4.56M', '14.8T': three digits and a letter."""
    if n < 1e4:
        return f"{n:,.0f}"
    size, letter = next(pair for pair in _SIZES if n >= pair[0])
    return f"{n / size:.{max(0, 2 - int(math.log10(n / size)))}f}{letter}"


def tick(value: float, place: int) -> str:
    """A number at an axis: '0.002', '2,500', '15K', '1.5M'. `place` is its index, not used."""
    if abs(value) < 1e4:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
    size, letter = next(pair for pair in _SIZES if abs(value) >= pair[0])
    return f"{value / size:g}{letter}"


def memory(n: int) -> str:
    """Bytes: '812 MB', '1.23 GB'."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def rate(tokens_per_second: float) -> str:
    """'5,120 tok/s', '12.3 tok/s'."""
    digits = 0 if tokens_per_second >= 100 else 1
    return f"{tokens_per_second:,.{digits}f} tok/s"


def share(part: float | None) -> str:
    """'43 %'; '?' if not known."""
    return "?" if part is None else f"{part:.0%}".replace("%", " %")


def utilisation(mfu: float) -> str:
    """'43 %'; more than all there is is told to be no truth about the training."""
    return share(mfu) + (f" ({BUSY})" if mfu > 1 else "")


def bars(load: Sequence[float], width: int) -> str:
    """One bar per expert, the mean load half high and twice the mean or more full.

    More than `width` experts share bars evenly, the tallest of each group shown.
    """
    if not load:
        return ""
    group = math.ceil(len(load) / width)
    tallest = [max(load[first : first + group]) for first in range(0, len(load), group)]
    mean = sum(load) / len(load)
    return "".join(_bar(value / mean) for value in tallest) if mean > 0 else _BARS[0] * len(tallest)


def _bar(relative: float) -> str:
    """The bar of a load relative to the mean."""
    if not math.isfinite(relative):
        return "?"
    return _BARS[min(len(_BARS) - 1, max(0, math.ceil(relative * len(_BARS) / 2) - 1))]
