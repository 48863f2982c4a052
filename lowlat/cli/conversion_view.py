"""What a conversion did, in a terminal: where loss arises layer by layer, then all in all."""

import json
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from lowlat.cli.answer_report import print_rows
from lowlat.convert.report import PLOT_FILE, REPORT_FILE, Report
from lowlat.train.metrics.formatting import clock, count

Object = dict[str, Any]


def print_conversion(report: Report, console: Console | None = None) -> None:
    """What a conversion did and where it is; more where DST/conversion.json tells more."""
    console = Console() if console is None else console
    before, after = report.cache_bytes_per_token_before, report.cache_bytes_per_token_after
    rows = {
        "attention": f"{report.attention_before}  ->  {report.attention_after}",
        "cache per token": f"{before:,}  ->  {after:,} bytes in bf16, "
        f"{report.cache_bytes_per_token_int8:,} in int8",
        "parameters": f"{report.parameters_before:,}  ->  {report.parameters_after:,}",
        "weights": f"{decimal(report.weight_bytes_before)}  ->  "
        f"{decimal(report.weight_bytes_after)}",
        "bits per weight": f"{report.bits_per_weight_before:.2f}  ->  "
        f"{report.bits_per_weight_after:.2f}",
    }
    if report.experts is not None:
        rows["experts"] = f"in every layer {report.experts}; they compute the same until trained"
    written = f"{report.destination} in {report.seconds:.1f} s"
    file = report.destination / REPORT_FILE
    if file.is_file():
        told = json.loads(file.read_text(encoding="utf-8"))
        console.print(_layers(told), highlight=False, markup=False)
        rows |= _compression_rows(told) | _healing_rows(told) | _evaluation_rows(told)
        plot = report.destination / PLOT_FILE
        drawn = f" and {PLOT_FILE}" if plot.exists() else "; the plot needs lowlat[train]"
        written += f", this report as {REPORT_FILE}{drawn}"
    rows["written"] = written
    print_rows(rows, console)


def _layers(told: Object) -> Table:
    """One row for each layer; widths where layers differ."""
    layers = told["layers"]
    differ = len({(layer["latent"], layer["rotary"]) for layer in layers}) > 1
    table = Table(box=None, padding=(0, 2), header_style="bold cyan")
    weighed = all(layer["alone"] is not None for layer in layers)
    names = ["layer", *["latent", "rotary key"] * differ, *["alone, nats"] * weighed]
    for name in (*names, "attention, predicted", "residual stream, measured"):
        table.add_column(name, justify="right")
    for number, layer in enumerate(layers):
        widths = [str(layer["latent"]), f"{layer['rotary']} ({layer['rotary_share']:.0%})"]
        errors = [f"{layer[key] ** 0.5:.1%}" for key in ("predicted", "measured")]
        alone = [f"{layer['alone']:.4f}"] if weighed else []
        table.add_row(str(number), *widths * differ, *alone, *errors)
    return table


def _compression_rows(told: Object) -> dict[str, str]:
    before, after = told["perplexity_before"], told["perplexity_after"]
    layers = told["layers"]
    worst = max(range(len(layers)), key=lambda number: layers[number]["measured"])
    latent = sum(layer["latent"] for layer in layers) / len(layers)
    rotary = sum(layer["rotary"] for layer in layers) / len(layers)
    folded = f", frequencies folded by {told['folded']}" if told["folded"] > 1 else ""
    return {
        "recipe": f"{told['recipe']}{folded}, layout {told['layout']}, calibrated on "
        f"{told['calibration']}",
        "channels": f"{told['channels_before']}  ->  {latent + rotary:.0f} a token and layer "
        f"({told['channels_after'] / told['channels_before']:.0%} kept): latent {latent:.0f} + "
        f"rotary key {rotary:.0f}",
        "worst layer": f"{worst}: behind it the residual stream deviates by "
        f"{layers[worst]['measured'] ** 0.5:.1%}",
        "calibration": f"perplexity {before:.2f}  ->  {after:.2f} ({after / before:.3f} times) on "
        "other parts of that text",
    }


def _healing_rows(told: Object) -> dict[str, str]:
    if "healing" not in told:
        return {}
    found = told["healing"]
    times = found["tokens"] / found["text_tokens"]
    often = f", read {times:.1f} times" if times > 1 else ""
    before, after = found["divergence_before"], found["divergence_after"]
    losses = found["loss_before"], found["loss_after"]
    verdict = "; it made the model worse: give more tokens" if after > before else ""
    return {
        "healing": f"{count(found['tokens'])} tokens of a text of "
        f"{count(found['text_tokens'])}{often}, in "
        f"{clock(found['seconds'])} ({found['tokens_per_second']:,.0f} tokens/s)",
        "held-out text": f"divergence from the original {before:.4f}  ->  {after:.4f} nats per "
        f"token, loss {losses[0]:.4f}  ->  {losses[1]:.4f}{verdict}",
    }


def _evaluation_rows(told: Object) -> dict[str, str]:
    if "evaluation" not in told:
        return {}
    found = told["evaluation"]
    first = found["original"]["perplexity"]
    said = [f"{first:.2f}"]
    for name in ("compressed", "healed"):
        if name in found:
            value = found[name]["perplexity"]
            said.append(f"{name} {value:.2f} ({value / first:.3f} times)")
    return {"perplexity": f"{'  ->  '.join(said)} on {found['text']}"}
