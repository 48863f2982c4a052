"""Number formats shared by progress views, tables and plots."""

import math
from collections.abc import Sequence

_SIZES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
BUSY = "rate measured while busy"
"""Note for an MFU above 1: other programs ran while the GEMM rate was measured."""
_BARS = "▁▂▃▄▅▆▇█"


def clock(seconds: int | float | None) -> str:
    """A duration such as '0:07', '12:34', '3:45:10' or '2 d 03:45'; '?' if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def count(n: int | float) -> str:
    """A count with three digits and a suffix, such as '512', '12.3K', '4.56M' or '14.8T'."""
    if n < 1e4:
        return f"{n:,.0f}"
    size, letter = next(pair for pair in _SIZES if n >= pair[0])
    return f"{n / size:.{max(0, 2 - int(math.log10(n / size)))}f}{letter}"


def tick(value: float, place: int) -> str:
    """An axis label such as '0.002', '2,500', '15K' or '1.5M'; `place` is unused."""
    if abs(value) < 1e4:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
    size, letter = next(pair for pair in _SIZES if abs(value) >= pair[0])
    return f"{value / size:g}{letter}"


def memory(n: int) -> str:
    """Bytes as '812 MB' or '1.23 GB'."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def rate(tokens_per_second: float) -> str:
    """Throughput as '5,120 tok/s' or '12.3 tok/s'."""
    digits = 0 if tokens_per_second >= 100 else 1
    return f"{tokens_per_second:,.{digits}f} tok/s"


def share(part: float | None) -> str:
    """A percentage as '43 %'; '?' if unknown."""
    return "?" if part is None else f"{part:.0%}".replace("%", " %")


def utilisation(mfu: float) -> str:
    """MFU as '43 %', with a note if it is above 100 %."""
    return share(mfu) + (f" ({BUSY})" if mfu > 1 else "")


def bars(load: Sequence[float], width: int) -> str:
    """Bar chart of expert loads: the mean load is half height, twice the mean or more is full.

    More than `width` experts are grouped evenly; each bar is the maximum of its group.
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
