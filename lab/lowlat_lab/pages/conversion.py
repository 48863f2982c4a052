"""The figures of benchmarks/conversion.py in the tables and the picture of a page.

    python benchmarks/conversion_page.py WORK/figures.json docs/results/conversion.md

Owns tables and drawing; every figure is measured there, and what is said about them stands on the
page.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lowlat.utils.plots import STYLE
from lowlat_lab.study.plot import COLOURS, MARKERS

Figures = dict[str, Any]
Row = Sequence[str]
END = "<!-- end -->"
TOP = 6
"""Of the picture: what is worse stands in the table."""
INT8 = "int8 cache"
LINES = {(False, False): "-", (False, True): ":", (True, False): "--", (True, True): "-."}
FILLS = {
    (False, False): "full",
    (False, True): "none",
    (True, False): "bottom",
    (True, True): "top",
}
"""By whether a model is healed, and whether its cache is int8."""
KINDS = {
    "mha2mla": "MHA2MLA",
    "transmla": "TransMLA",
    "weighted": "weighted",
    "free": "weighted, free layout",
}


def main() -> None:
    figures, page = map(Path, sys.argv[1:])
    write_page(json.loads(figures.read_text(encoding="utf-8")), page)


def write_page(figures: Figures, page: Path) -> None:
    """Fill the places of `page` that stand between marks, and draw the picture beside it.

    A place begins with a line `<!-- figures: NAME -->` and ends with `<!-- end -->`; what is
    written around it stays. Raises ValueError where a place has no end or an unknown name.
    """
    filled = _places(figures)
    parts = page.read_text(encoding="utf-8").split("<!-- figures: ")
    for index, part in enumerate(parts[1:], start=1):
        name, _, rest = part.partition(" -->")
        _, end, after = rest.partition(END)
        if not end or name not in filled:
            raise ValueError(f"{page}: no place of figures: {name}")
        parts[index] = f"{name} -->\n\n{filled[name]}\n\n{END}{after}"
    page.write_text("<!-- figures: ".join(parts), encoding="utf-8")
    _draw(figures, page.with_suffix(".svg"))


def _places(figures: Figures) -> dict[str, str]:
    """What stands in the places of a page, by their names."""
    texts = list(figures["original"])
    originals = ", ".join(f"{name} {value:.2f}" for name, value in figures["original"].items())
    measured = (
        f"Perplexity relative to the unconverted model ({originals}) on {figures['windows']} "
        f"windows of {figures['window']:,} tokens spread evenly over each text, bf16 weights. "
        "*same* is how often both find the same next token likeliest, over all places of the "
        "windows. No model was calibrated or healed on these texts."
    )
    columns = [f"{text}: ratio | same" for text in texts]
    models = _in_order(figures["models"])
    plain = {name: entry for name, entry in models.items() if not _budget(name)}
    healed = {name: entry for name, entry in models.items() if _budget(name)}
    return {
        "measured": measured,
        "recipes": _table(
            ["recipe", "cache kept", *columns],
            (_quality(name, entry, texts, "bf16") for name, entry in plain.items()),
        ),
        "healed": _table(
            ["recipe", "cache kept", "tokens", *columns, "int8 cache: bytes kept, ratios"],
            (_healed(name, entry, texts) for name, entry in healed.items()),
        ),
        "int8": _table(
            ["recipe", "bytes kept", *columns, "over a bf16 cache"],
            (_int8(name, entry, texts) for name, entry in plain.items()),
        ),
        "speed": _table(
            ["context", "model", "cache", "tokens/s", "ratio", "MB of cache"],
            map(_speed, figures["speed"]),
        ),
        "commands": "\n".join(f"    {entry['command']}" for entry in models.values()),
    }


def _in_order(models: dict[str, Figures]) -> dict[str, Figures]:
    """By recipe, then by falling share of the cache."""
    kinds = list(KINDS)

    def place(item: tuple[str, Figures]) -> tuple[int, float]:
        name, entry = item
        return kinds.index(name.partition("-")[0]), -entry["conversion"]["channels_after"]

    return dict(sorted(models.items(), key=place))


def _label(name: str) -> str:
    return KINDS[name.partition("-")[0]]


def _budget(name: str) -> str:
    """Tokens that the model of this name was healed on, "" for none."""
    return name.partition("-healed-")[2]


def _kept(figures: Figures) -> str:
    conversion = figures["conversion"]
    return f"{conversion['channels_after'] / conversion['channels_before']:.0%}"


def _quality(name: str, entry: Figures, texts: Sequence[str], cache: str) -> Row:
    found = [f"{entry[cache][t]['ratio']:.3f} | {entry[cache][t]['same']:.1%}" for t in texts]
    return [_label(name), _kept(entry), *found]


def _healed(name: str, entry: Figures, texts: Sequence[str]) -> Row:
    label, kept, *found = _quality(name, entry, texts, "bf16")
    int8 = ", ".join(f"{entry['int8'][text]['ratio']:.3f}" for text in texts)
    return [label, kept, _budget(name), *found, f"{_share_of_bytes(entry):.0%}: {int8}"]


def _int8(name: str, entry: Figures, texts: Sequence[str]) -> Row:
    row = _quality(name, entry, texts, "int8")
    share = _share_of_bytes(entry)
    more = max(entry["int8"][t]["ratio"] / entry["bf16"][t]["ratio"] - 1 for t in texts)
    return [row[0], f"{share:.0%}", *row[2:], f"{more:+.2%} at most"]


def _share_of_bytes(entry: Figures) -> float:
    conversion = entry["conversion"]
    layers = len(conversion["layers"])
    return entry["int8_bytes_per_token"] / (2 * conversion["channels_before"] * layers)


def _speed(row: Figures) -> Row:
    return [
        f"{row['context']:,}",
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


def _lines(models: dict[str, Figures]) -> dict[tuple[str, str], list[tuple[float, Figures]]]:
    """By recipe and what was done beside it: shares of the bytes of cache, and what was found."""
    lines: dict[tuple[str, str], list[tuple[float, Figures]]] = {}
    for name, entry in _in_order(models).items():
        kind, budget = name.partition("-")[0], _budget(name)
        kept = entry["conversion"]["channels_after"] / entry["conversion"]["channels_before"]
        way = f"healed on {budget} tokens" if budget else ""
        lines.setdefault((kind, way), []).append((kept, entry["bf16"]))
        beside = ", ".join(filter(None, [way, INT8]))
        lines.setdefault((kind, beside), []).append((_share_of_bytes(entry), entry["int8"]))
    return lines


def _draw(figures: Figures, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    lines = _lines(figures["models"])
    texts = list(figures["original"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.2), layout="constrained")
        panels = figure.subplots(1, len(texts), squeeze=False)[0]
        for axes, text in zip(panels, texts, strict=True):
            for (kind, way), points in lines.items():
                index, style = list(KINDS).index(kind), ("healed" in way, INT8 in way)
                places, entries = zip(*sorted(points, key=lambda p: p[0]), strict=True)
                if min(entry[text]["ratio"] for entry in entries) > TOP:
                    continue
                axes.plot(
                    [100 * place for place in places],
                    [entry[text]["ratio"] for entry in entries],
                    marker=MARKERS[index % len(MARKERS)],
                    color=COLOURS[index % len(COLOURS)],
                    linestyle=LINES[style],
                    fillstyle=FILLS[style],
                    label=", ".join(filter(None, [KINDS[kind], way])),
                )
            axes.set_yscale("log")
            axes.set_ylim(0.98, TOP)
            axes.yaxis.set_major_locator(FixedLocator([1, 1.1, 1.2, 1.5, 2, 3, 5]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.set(title=text, xlabel="% of the bytes of cache", ylabel="perplexity / original's")
        drawn = [axes.get_legend_handles_labels() for axes in panels]
        named = {label: line for own in drawn for line, label in zip(*own, strict=True)}
        figure.legend(named.values(), named, loc="outside right upper", frameon=False, fontsize=7)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
