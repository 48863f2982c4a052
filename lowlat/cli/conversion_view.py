"""Conversion report in a terminal: losses by layer, then totals."""

import json
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from lowlat.cli.tables import print_rows
from lowlat.convert.report import PLOT_FILE, REPORT_FILE, ConversionReport
from lowlat.train.metrics.formatting import clock, count

Object = dict[str, Any]
ERRORS = ("predicted_error", "measured_deviation")
"""Squared errors of a layer in the report, printed as their roots."""


def print_conversion(report: ConversionReport, console: Console | None = None) -> None:
    """Print a conversion's report, including DST/conversion.json if there is one."""
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
        details = json.loads(file.read_text(encoding="utf-8"))
        if details.get("to") == "dsa":
            rows |= sparse_rows(details) | {"written": f"{written}, this report as {REPORT_FILE}"}
            print_rows(rows, console)
            return
        console.print(_layers(details), highlight=False, markup=False)
        rows |= _compression_rows(details) | _recovery_rows(details) | _evaluation_rows(details)
        plot = report.destination / PLOT_FILE
        drawn = f" and {PLOT_FILE}" if plot.exists() else "; the plot needs lowlat[train]"
        written += f", this report as {REPORT_FILE}{drawn}"
    rows["written"] = written
    print_rows(rows, console)


def sparse_rows(details: Object) -> dict[str, str]:
    """Rows of a conversion to sparse attention."""
    found, indexer = details["warmup"], details["indexer"]
    layers = found["layers"]
    worst = min(layers, key=lambda layer: layer["recall_last"])
    first, last = (
        sum(layer[name] for layer in layers) / len(layers) for name in ("kl_first", "kl_last")
    )
    reason = details["model_type_reason"]
    rows = {
        "model_type": details["model_type"] + (f", because {reason}" if reason else ""),
        "indexers": f"{indexer['index_n_heads']} heads of {indexer['index_head_dim']}, top-k "
        f"{indexer['index_topk']:,}",
        "warm-up": f"{count(found['tokens'])} tokens in {clock(found['seconds'])} "
        f"({found['tokens_per_second']:,.0f} tokens/s), KL {first:.4f}  ->  {last:.4f} nats",
        "recall": f"of attention mass {sum(x['recall_last'] for x in layers) / len(layers):.3f} "
        f"over {found['sequence_length']:,} tokens, worst in layer {worst['layer']}: "
        f"{worst['recall_last']:.3f}",
    }
    if "recovery" in details:
        recovery = details["recovery"]
        rows["recovery training"] = (
            f"{count(recovery['tokens'])} tokens in {clock(recovery['seconds'])}, divergence from "
            f"the original {recovery['divergence_before']:.4f}  ->  "
            f"{recovery['divergence_after']:.4f} nats per token"
        )
    return rows | _sparse_evaluation_rows(details)


def _sparse_evaluation_rows(details: Object) -> dict[str, str]:
    if "evaluation" not in details:
        return {}
    found = details["evaluation"]
    dense = found["dense"]
    windows = f"{found['windows']} x {found['context']:,} tokens"
    rows = {
        "perplexity": f"{found['original']['perplexity']:.3f}  ->  {dense['perplexity']:.3f} "
        f"({dense['ratio']:.4f}x) with dense attention, on {windows}"
    }
    for row in found["index_topk"]:
        low, high = row["ratio_range"]
        rows[f"top-k {row['index_topk']:,}"] = (
            f"perplexity {row['perplexity']:.3f} ({row['ratio']:.4f}x, by window {low:.4f} to "
            f"{high:.4f}), recall {row['recall_mean']:.3f}, worst layer {min(row['recall']):.3f}"
        )
    for place in found["needle"]:
        parts = [
            f"{name} {place[name]['loss']:.3f} ({place[name]['accuracy']:.0%})"
            for name in ("original", "dense", "sparse")
        ]
        rows[f"needle at {place['depth']:.0%}"] = f"loss (accuracy): {', '.join(parts)}"
    return rows


def _layers(details: Object) -> Table:
    """One row per layer; with widths if layers differ."""
    layers = details["layers"]
    differ = len({(layer["latent"], layer["rotary"]) for layer in layers}) > 1
    table = Table(box=None, padding=(0, 2), header_style="bold cyan")
    has_divergence = all(layer["predicted_divergence"] is not None for layer in layers)
    names = ["layer", *["latent", "rotary key"] * differ, *["alone, nats"] * has_divergence]
    for name in (*names, "attention, predicted", "residual stream, measured"):
        table.add_column(name, justify="right")
    for number, layer in enumerate(layers):
        widths = [str(layer["latent"]), f"{layer['rotary']} ({layer['rotary_share']:.0%})"]
        errors = [f"{layer[key] ** 0.5:.1%}" for key in ERRORS]
        alone = [f"{layer['predicted_divergence']:.4f}"] if has_divergence else []
        table.add_row(str(number), *widths * differ, *alone, *errors)
    return table


def _compression_rows(details: Object) -> dict[str, str]:
    before, after = details["perplexity_before"], details["perplexity_after"]
    layers = details["layers"]
    worst = max(range(len(layers)), key=lambda number: layers[number]["measured_deviation"])
    latent = sum(layer["latent"] for layer in layers) / len(layers)
    rotary = sum(layer["rotary"] for layer in layers) / len(layers)
    folded = f", frequencies folded by {details['fold']}" if details["fold"] > 1 else ""
    return {
        "method": f"{details['method']}{folded}, layout {details['layout']}, calibrated on "
        f"{details['calibration']}",
        "channels": f"{details['channels_before']}  ->  {latent + rotary:.0f} per token and layer "
        f"({details['channels_after'] / details['channels_before']:.0%} kept): "
        f"latent {latent:.0f} + rotary key {rotary:.0f}",
        "worst layer": f"{worst}: the residual stream after it deviates by "
        f"{layers[worst]['measured_deviation'] ** 0.5:.1%}",
        "calibration": f"perplexity {before:.2f}  ->  {after:.2f} ({after / before:.3f}x) on "
        "held-out parts of that text",
    }


def _recovery_rows(details: Object) -> dict[str, str]:
    if "recovery" not in details:
        return {}
    found = details["recovery"]
    times = found["tokens"] / found["text_tokens"]
    epochs = f", {times:.1f} epochs" if times > 1 else ""
    before, after = found["divergence_before"], found["divergence_after"]
    losses = found["loss_before"], found["loss_after"]
    verdict = "; it made the model worse, give more tokens" if after > before else ""
    return {
        "recovery training": f"{count(found['tokens'])} tokens from a text of "
        f"{count(found['text_tokens'])}{epochs}, in "
        f"{clock(found['seconds'])} ({found['tokens_per_second']:,.0f} tokens/s)",
        "held-out text": f"divergence from the original {before:.4f}  ->  {after:.4f} nats per "
        f"token, loss {losses[0]:.4f}  ->  {losses[1]:.4f}{verdict}",
    }


def _evaluation_rows(details: Object) -> dict[str, str]:
    if "evaluation" not in details:
        return {}
    found = details["evaluation"]
    first = found["original"]["perplexity"]
    parts = [f"{first:.2f}"]
    for name in ("compressed", "recovered"):
        if name in found:
            value = found[name]["perplexity"]
            parts.append(f"{name} {value:.2f} ({value / first:.3f}x)")
    return {"perplexity": f"{'  ->  '.join(parts)} on {found['text']}"}
