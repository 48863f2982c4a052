"""Conversion page: tables and plots from the figures of benchmarks/conversion.py."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lowlat.utils.plots import BLUE, GREEN, GREY, ORANGE, PINK, STYLE

Figures = dict[str, Any]
Row = Sequence[str]
END = "<!-- end -->"
TOP = 6
"""Highest perplexity ratio in a plot; the tables have the larger ones."""
TICKS = [1, 1.1, 1.2, 1.5, 2, 3, 5]
SHARES = (67, 50, 33)
"""Shares of the cache, in %, that all methods were measured at."""
SPEED_CONTEXT = 8000
"""Cached tokens of the speed table."""
LABEL_GAP = 1.12
"""Least ratio of the heights of two labels."""
METHODS = {
    "mha2mla": "MHA2MLA",
    "transmla": "TransMLA",
    "weighted": "weighted",
    "free": "weighted, free layout",
}
"""Labels by the first part of a model's name, in order of the tables."""
COLOURS = {"mha2mla": PINK, "transmla": ORANGE, "weighted": BLUE, "free": GREEN}


def write_page(figures: Figures, page: Path) -> None:
    """Fill the tables of `page` between its marks, and draw the plots next to it.

    A table begins with `<!-- figures: NAME -->` and ends with `<!-- end -->`; the text around
    it is preserved. Raises ValueError for a table without an end or with an unknown name.
    """
    tables = _tables(figures)
    parts = page.read_text(encoding="utf-8").split("<!-- figures: ")
    for index, part in enumerate(parts[1:], start=1):
        name, _, rest = part.partition(" -->")
        _, end, after = rest.partition(END)
        if not end or name not in tables:
            raise ValueError(f"{page}: no table of figures: {name}")
        parts[index] = f"{name} -->\n\n{tables[name]}\n\n{END}{after}"
    page.write_text("<!-- figures: ".join(parts), encoding="utf-8")
    _draw_methods(figures, page.with_suffix(".svg"))
    _draw_recovery(figures, page.with_name(f"{page.stem}-recovery.svg"))


def _tables(figures: Figures) -> dict[str, str]:
    """The generated parts of the page, by name."""
    texts = list(figures["original"])
    originals = ", ".join(f"{name} {value:.2f}" for name, value in figures["original"].items())
    measured = (
        f"Perplexity relative to the unconverted model ({originals}) on {figures['windows']} "
        f"windows of {figures['window']:,} tokens, spread evenly over each text, bf16 weights. "
        "*same* is the share of positions with the same most likely next token. No model was "
        "calibrated or trained on these texts."
    )
    columns = [f"{text}: ratio | same" for text in texts]
    models = _in_order(figures["models"])
    plain = {name: entry for name, entry in models.items() if not _tokens(name)}
    recovered = {name: entry for name, entry in models.items() if _tokens(name)}
    return {
        "measured": measured,
        "methods": _table(
            ["method", "cache kept", *columns, "int8: bytes kept", "increase"],
            (_plain(name, entry, texts) for name, entry in plain.items()),
        ),
        "recovered": _table(
            ["method", "cache kept", *columns],
            (_quality(name, entry, texts) for name, entry in recovered.items()),
        ),
        "speed": _table(
            ["model", "cache", "tokens/s", "ratio", "MB of cache"],
            map(_speed, (row for row in figures["speed"] if row["context"] == SPEED_CONTEXT)),
        ),
    }


def _in_order(models: dict[str, Figures]) -> dict[str, Figures]:
    """By method, then by falling share of the cache."""
    methods = list(METHODS)

    def place(item: tuple[str, Figures]) -> tuple[int, float]:
        name, entry = item
        return methods.index(_method(name)), -entry["conversion"]["channels_after"]

    return dict(sorted(models.items(), key=place))


def _method(name: str) -> str:
    return name.partition("-")[0]


def _tokens(name: str) -> str:
    """Recovery training tokens in a model's name; "" for none."""
    return name.partition("-healed-")[2]


def _share(entry: Figures) -> float:
    """Share of the cache's channels that is kept."""
    return entry["conversion"]["channels_after"] / entry["conversion"]["channels_before"]


def _quality(name: str, entry: Figures, texts: Sequence[str]) -> Row:
    found = [f"{entry['bf16'][t]['ratio']:.3f} | {entry['bf16'][t]['same']:.1%}" for t in texts]
    return [METHODS[_method(name)], f"{_share(entry):.0%}", *found]


def _plain(name: str, entry: Figures, texts: Sequence[str]) -> Row:
    """A row of the methods without training; last the effect of an int8 cache."""
    more = max(entry["int8"][t]["ratio"] / entry["bf16"][t]["ratio"] - 1 for t in texts)
    return [*_quality(name, entry, texts), f"{_share_of_bytes(entry):.0%}", f"{more:.2%}"]


def _share_of_bytes(entry: Figures) -> float:
    """Share of the original's bf16 cache bytes that an int8 cache takes."""
    conversion = entry["conversion"]
    layers = len(conversion["layers"])
    return entry["int8_bytes_per_token"] / (2 * conversion["channels_before"] * layers)


def _speed(row: Figures) -> Row:
    return [
        row["model"],
        row["cache"],
        f"{row['tokens_per_second']:.1f}",
        f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
        f"{row['cache_bytes'] / 1e6:.1f}",
    ]


def _table(head: Row, rows: Iterable[Row]) -> str:
    names = " | ".join(head)
    columns = names.count("|") + 1
    lines = [f"| {names} |", "|" + "---|" * columns]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _draw_methods(figures: Figures, path: Path) -> None:
    """Methods without training: perplexity over the share of the cache, on the first text."""
    text = next(iter(figures["original"]))
    series: dict[str, list[tuple[float, float]]] = {}
    for name, entry in figures["models"].items():
        ratio = entry["bf16"][text]["ratio"]
        if not _tokens(name) and ratio <= TOP and round(100 * _share(entry)) in SHARES:
            series.setdefault(_method(name), []).append((100 * _share(entry), ratio))
    lines = {METHODS[key]: (COLOURS[key], series[key]) for key in METHODS if key in series}
    _draw(lines, f"Compression methods without training ({text})", path)


def _draw_recovery(figures: Figures, path: Path) -> None:
    """Weighted in the free layout, before and after recovery training, on the first text."""
    text = next(iter(figures["original"]))
    series: dict[str, list[tuple[float, float]]] = {}
    recovered = [name for name in figures["models"] if name.startswith("free-") and _tokens(name)]
    for name in recovered:
        before, after = (figures["models"][each] for each in (name.partition("-healed-")[0], name))
        for label, entry in (
            ("no training", before),
            (f"after {_tokens(name)} tokens", after),
        ):
            point = 100 * _share(entry), entry["bf16"][text]["ratio"]
            series.setdefault(label, []).append(point)
    colours = dict(zip(series, (GREY, GREEN, BLUE, ORANGE), strict=False))
    lines = {label: (colours[label], points) for label, points in series.items()}
    _draw(lines, f"Recovery training, weighted in the free layout ({text})", path)


def _draw(lines: dict[str, tuple[str, list[tuple[float, float]]]], title: str, path: Path) -> None:
    """Perplexity ratio over the share of the cache, with a label at the left end of each line."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    style: dict[Any, Any] = {**STYLE, "font.size": 13, "axes.titlesize": 14}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.subplots()
        for colour, unsorted in lines.values():
            points = sorted(unsorted, reverse=True)
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, linewidth=2)
        _label(axes, lines)
        axes.set_yscale("log")
        axes.set_ylim(0.98, TOP)
        left, right = axes.get_xlim()
        axes.set_xlim(right, left - 0.55 * (right - left))
        axes.set_xticks(SHARES, [f"{share} %" for share in SHARES])
        axes.yaxis.set_major_locator(FixedLocator(TICKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
        axes.set(title=title, xlabel="KV cache kept", ylabel="perplexity, relative to original")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _label(axes: Any, lines: dict[str, tuple[str, list[tuple[float, float]]]]) -> None:
    """Name the lines at their last points, from low to high without overlaps."""
    ends = {label: (min(points), colour) for label, (colour, points) in lines.items()}
    height = 0.0
    for label, ((x, y), colour) in sorted(ends.items(), key=lambda item: item[1][0][1]):
        height = max(y, LABEL_GAP * height)
        place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (x, height), color=colour, **place)
