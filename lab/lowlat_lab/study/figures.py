"""The table of a report, as text in cells: what a terminal and a page both show. Owns wording and
number formats.
"""

from collections.abc import Callable
from typing import Any

from lowlat.train.metrics.formatting import count
from lowlat_lab.study.report import Report, find_comparison

Cell = Callable[[Report, dict[str, Any]], str]
"""A figure of an arm of a report."""

NOTHING = ""


def table_of(report: Report, *, narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headings and one row per arm; `narrow`: without what a terminal has no room for."""
    columns = COLUMNS[report["study"]]
    left_out = PAGE_ONLY if narrow else TERMINAL_ONLY
    columns = {name: cell for name, cell in columns.items() if name not in left_out}
    rows = [[cell(report, arm) for cell in columns.values()] for arm in report["arms"]]
    return list(columns), rows


def with_half(value: dict[str, Any] | None, digits: int = 4) -> str:
    """'3.2145 ± 0.0031'; without the half where there is one value only."""
    if value is None:
        return NOTHING
    text = f"{value['mean']:.{digits}f}"
    return text if value["half"] is None else f"{text} ± {value['half']:.{digits}f}"


def percent(share: dict[str, Any] | None) -> str:
    """'+0.12 % ± 0.05' of a share with its interval."""
    if share is None:
        return NOTHING
    text = f"{100 * share['mean']:+.2f} %"
    return text if share["half"] is None else f"{text} ± {100 * share['half']:.2f}"


def _label(_report: Report, arm: dict[str, Any]) -> str:
    return arm["label"]


def _loss(_report: Report, arm: dict[str, Any]) -> str:
    return with_half(arm["loss"]) if "loss" in arm else "failed"


def _difference(report: Report, arm: dict[str, Any]) -> str:
    found = find_comparison(report, arm["name"], report["arms"][0]["name"])
    if found is None:
        return NOTHING
    mean, half = found["difference"]["mean"], found["difference"]["half"]
    return f"{mean:+.4f}" if half is None else f"{mean:+.4f} ± {half:.4f}"


def _pooled(report: Report, arm: dict[str, Any]) -> str:
    found = find_comparison(report, arm["name"], report["arms"][0]["name"])
    half = None if found is None else found["pooled_half"]
    return NOTHING if half is None else f"± {half:.4f}"


def _parameters(_report: Report, arm: dict[str, Any]) -> str:
    return f"{count(arm['parameters'])} ({arm['difference']:+.2%})"


def _cache(_report: Report, arm: dict[str, Any]) -> str:
    return f"{arm['cache_elements']} ({arm['groups_equivalent']:.2f} groups)"


def _bytes(_report: Report, arm: dict[str, Any]) -> str:
    return f"{arm['cache_bytes_per_token']:,}"


def _decode(_report: Report, arm: dict[str, Any]) -> str:
    speed = arm.get("decode")
    if speed is None:
        return NOTHING
    ratio = NOTHING if speed["ratio"] is None else f" ({speed['ratio']:.2f}x)"
    mark = NOTHING if speed["is_native"] else " *"
    return f"{speed['tokens_per_second']:,.0f}{ratio}{mark}"


def _training(_report: Report, arm: dict[str, Any]) -> str:
    if "loss" not in arm:
        return NOTHING
    ratio = NOTHING if arm["train_ratio"] is None else f" ({arm['train_ratio']:.2f}x)"
    return f"{arm['train_tokens_per_second']:,.0f}{ratio}"


def _ratio(_report: Report, arm: dict[str, Any]) -> str:
    ratio = arm.get("train_ratio")
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def _interval(key: str, digits: int) -> Cell:
    return lambda _report, arm: with_half(arm.get(key), digits)


def _share(key: str) -> Cell:
    return lambda _report, arm: percent(arm.get(key))


def _number(key: str) -> Cell:
    return lambda _report, arm: count(arm[key])


COLUMNS: dict[str, dict[str, Cell]] = {
    "attention": {
        "": _label,
        "parameters": _parameters,
        "cache per layer": _cache,
        "bytes per token": _bytes,
        "held-out loss": _loss,
        "minus MHA": _difference,
        "pooled": _pooled,
        "decode tok/s": _decode,
        "train tok/s": _training,
        "train": _ratio,
    },
    "balance": {
        "": _label,
        "held-out loss": _loss,
        "minus bias": _difference,
        "MaxVio, last steps": _interval("train_max_violations_mean", 2),
        "worst layer": _interval("train_max_violations_worst", 2),
        "MaxVio, held out": _interval("max_violations_mean", 2),
        "worst layer, held out": _interval("max_violations_worst", 2),
        "train tok/s": _training,
    },
    "mtp": {
        "": _label,
        "main model": _number("parameters"),
        "module": _number("mtp_parameters"),
        "held-out loss": _loss,
        "minus without": _difference,
        "module's loss": _interval("mtp_losses_mean", 4),
        "drafts kept": _interval("acceptance_mean", 3),
        "drafts right": _interval("draft_hits_mean", 3),
        "main right": _interval("main_hits_mean", 3),
        "train tok/s": _training,
        "train": _ratio,
    },
    "precision": {
        "": _label,
        "held-out loss": _loss,
        "minus bf16": _difference,
        "relative": _share("loss_relative"),
        "relative, last steps": _share("train_loss_relative"),
        "train tok/s": _training,
        "train": _ratio,
    },
}
"""Columns of each study."""

PAGE_ONLY = (
    "parameters",
    "cache per layer",
    "pooled",
    "worst layer",
    "worst layer, held out",
    "main model",
    "module",
    "drafts right",
    "main right",
    "train tok/s",
)
"""Columns for which a terminal has no room."""
TERMINAL_ONLY = ("train",)
"""What stands there for them."""
