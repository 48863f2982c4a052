"""Plot of a comparison: relative differences over the layers."""

from pathlib import Path
from typing import Any

from lowlat.compare.result_text import diagnosis_lines, headline
from lowlat.utils.errors import UserError

Object = dict[str, Any]

SMALLEST = 1e-9
"""Value of equal parts on the logarithmic axis."""
COLUMNS = 4
"""Number of line styles."""


def require_matplotlib() -> None:
    """Raises UserError without matplotlib; called before models are loaded."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("--plot needs matplotlib; install lowlat[bench], or use --json") from error


def check_ending(path: Path) -> None:
    """Raises UserError for a suffix of `path` that is not an image format; no suffix means png."""
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix and path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"--plot {path}: '{path.suffix}' is not an image format; use .svg or .png")


def draw(result: Object, path: Path) -> None:
    """Write the plot; the suffix of `path` selects the format (svg, png, pdf)."""
    from matplotlib.figure import Figure

    has_gates = any(item["block"].startswith("layer") for item in result["experts"])
    figure = Figure(figsize=(9.0, 7.0 if has_gates else 5.0), layout="constrained")
    ratios = [3, 1] if has_gates else [1]
    panels = figure.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False, sharex=True)
    _curves(panels[0][0], result)
    if has_gates:
        _changes(panels[1][0], result)
    panels[-1][0].set_xlabel("layer")
    panels[-1][0].xaxis.get_major_locator().set_params(integer=True)
    title = [f"A {result['a']['name']}, B {result['b']['name']}", headline(result)]
    figure.suptitle("\n".join([*title, *diagnosis_lines(result)[:1]]), fontsize=9)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: cannot be written ({error})") from error


def _curves(axes: Any, result: Object) -> None:
    """Relative difference of every part over the layers."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for item in result["parts"]:
        if item["stage"] == "layer":
            value = 1e9 if item["relative"] is None else max(item["relative"], SMALLEST)
            curves.setdefault(item["part"], []).append((item["number"], value))
    for place, (part, points) in enumerate(curves.items()):
        style = ("-", "--", ":", "-.")[place // 5 % COLUMNS]
        axes.plot(*zip(*points, strict=True), style, marker=".", label=part)
    axes.axhline(result["tolerance"], color="black", linewidth=0.8, label="tolerance")
    first = result["first_difference"]
    if first is not None and first["stage"] == "layer":
        value = 1e9 if first["relative"] is None else first["relative"]
        axes.plot([first["number"]], [value], "o", color="red", fillstyle="none", markersize=12)
    axes.set(yscale="log", ylabel="relative difference")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _changes(axes: Any, result: Object) -> None:
    """Share of A's experts that B does not select."""
    found = [item for item in result["experts"] if item["block"].startswith("layer")]
    numbers = [int(item["block"].split()[1]) for item in found]
    axes.bar(numbers, [100 * item["changed"] / item["chosen"] for item in found], color="gray")
    axes.set_ylabel("experts changed, %")
    axes.grid(alpha=0.3)
