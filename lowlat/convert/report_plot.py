"""Plot of a compression: errors and cache widths by layer, and the recovery training curve.

All figures are from conversion.json. The same report gives the same bytes.
"""

import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from lowlat.utils.plots import BLUE, GREEN, GREY, ORANGE, STYLE

Object = Mapping[str, Any]


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(report: Object) -> bytes:
    """Plot a report (conversion.json's object) as an SVG file."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = [_errors, _widths] + [_recovery] * ("recovery" in report)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8 * len(panels), 4.0), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, own in zip(panels, axes, strict=True):
            panel(own, report)
        figure.suptitle(_title(report), fontsize=10)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _title(report: Object) -> str:
    before, after = (report[f"cache_bytes_per_token_{when}"] for when in ("before", "after"))
    return (
        f"{report['attention_before']} to {report['attention_after']}, method {report['method']}: "
        f"{before:,} to {after:,} bytes of cache per token"
    )


def _errors(axes: Any, report: Object) -> None:
    layers = report["layers"]
    for key, marker, colour, label in (
        ("predicted_error", "o", BLUE, "attention output, predicted"),
        ("measured_deviation", "s", ORANGE, "residual stream, measured"),
    ):
        values = [100 * layer[key] ** 0.5 for layer in layers]
        axes.plot(
            range(len(layers)), values, marker=marker, color=colour, markersize=4, label=label
        )
    axes.set(title="Error of each layer", ylabel="% of the residual stream")
    _start_at_zero(axes)
    axes.legend(fontsize=8, frameon=False)
    _label_layers(axes)


def _widths(axes: Any, report: Object) -> None:
    layers, places = report["layers"], range(len(report["layers"]))
    latent = [layer["latent"] for layer in layers]
    rotary = [layer["rotary"] for layer in layers]
    axes.bar(places, latent, color=BLUE, label="latent")
    axes.bar(places, rotary, bottom=latent, color=ORANGE, label="rotary key")
    axes.axhline(report["channels_before"], color=GREY, linestyle="--", label="before")
    axes.set(title="Channels of a cache entry", ylabel="channels")
    axes.set_ylim(top=1.3 * report["channels_before"])
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper center")
    _label_layers(axes)


def _recovery(axes: Any, report: Object) -> None:
    found = report["recovery"]["evaluations"]
    tokens = [entry["tokens"] for entry in found]
    axes.plot(tokens, [entry["divergence"] for entry in found], marker="o", color=GREEN)
    axes.set(
        title="Recovery training: divergence on held-out text",
        xlabel="training tokens",
        ylabel="KL from the original, nats per token",
    )
    _start_at_zero(axes)


def _start_at_zero(axes: Any) -> None:
    """Start the axis at 0, and leave space above the highest marker."""
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax)


def _label_layers(axes: Any) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
