"""Tables of a report as text cells, for terminal and page: columns and number formats."""

from collections.abc import Callable
from typing import Any

from lowlat.train.metrics.formatting import count
from lowlat_lab.study.report import Report, find_comparison, labels_of

Cell = Callable[[Report, dict[str, Any]], str]
"""Formats a figure of a variant."""

NOTHING = ""


def table_of(report: Report, *, narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headings and one row per variant, without empty columns. narrow: only the columns that fit a
    terminal."""
    left_out = PAGE_ONLY if narrow else TERMINAL_ONLY
    columns = {
        name: [cell(report, variant) for variant in report["variants"]]
        for name, cell in COLUMNS[report["study"]].items()
        if name not in left_out
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return list(filled), [list(row) for row in zip(*filled.values(), strict=True)]


def comparison_table(
    report: Report, *, with_base: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Headings and one row per comparison of two variants.

    with_base=False leaves out comparisons with the first variant, which table_of has as a column.
    """
    labels, base = labels_of(report), report["variants"][0]["name"]
    headings = ["left", "right", "difference", "lower loss", "pooled ±", "lower loss, pooled"]
    rows: list[list[str]] = []
    for item in report["comparisons"]:
        if not with_base and base in (item["left"], item["right"]):
            continue
        left, right = labels[item["left"]], labels[item["right"]]
        lower = {"lower": left, "higher": right, "undecided": "undecided"}
        half = item["pooled_half"]
        rows.append(
            [
                left,
                right,
                _signed(item["difference"]),
                lower[item["verdict"]],
                NOTHING if half is None else f"{half:.4f}",
                lower[item["pooled_verdict"]],
            ]
        )
    return headings, rows


def with_half(value: dict[str, Any] | None, digits: int = 4) -> str:
    """'3.2145 ± 0.0031', or the mean alone for a single value."""
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


def _label(_report: Report, variant: dict[str, Any]) -> str:
    return variant["label"]


def _loss(report: Report, variant: dict[str, Any]) -> str:
    if "loss" in variant:
        return with_half(variant["loss"])
    has_failed = any(item["variant"] == variant["name"] for item in report["failures"])
    return "failed" if has_failed else "no run yet"


def _difference(report: Report, variant: dict[str, Any]) -> str:
    found = find_comparison(report, variant["name"], report["variants"][0]["name"])
    if found is None:
        return NOTHING
    return _signed(found["difference"])


def _signed(difference: dict[str, Any]) -> str:
    mean, half = difference["mean"], difference["half"]
    return f"{mean:+.4f}" if half is None else f"{mean:+.4f} ± {half:.4f}"


def _pooled(report: Report, variant: dict[str, Any]) -> str:
    found = find_comparison(report, variant["name"], report["variants"][0]["name"])
    half = None if found is None else found["pooled_half"]
    return NOTHING if half is None else f"± {half:.4f}"


def _parameters(_report: Report, variant: dict[str, Any]) -> str:
    return f"{count(variant['parameters'])} ({variant['difference']:+.2%})"


def _cache(_report: Report, variant: dict[str, Any]) -> str:
    return f"{variant['cache_elements']} ({variant['groups_equivalent']:.2f} groups)"


def _bytes(_report: Report, variant: dict[str, Any]) -> str:
    return f"{variant['cache_bytes_per_token']:,}"


def _decode(_report: Report, variant: dict[str, Any]) -> str:
    marks = {True: NOTHING, False: " *"}
    return " / ".join(
        f"{time['milliseconds']:.2f}{marks[time['is_measured']]}" for time in variant["decode"]
    )


def _seeds(_report: Report, variant: dict[str, Any]) -> str:
    return str(len(variant["runs"]))


def _training(_report: Report, variant: dict[str, Any]) -> str:
    if "loss" not in variant:
        return NOTHING
    ratio = NOTHING if variant["train_ratio"] is None else f" ({variant['train_ratio']:.2f}x)"
    return f"{variant['train_tokens_per_second']:,.0f}{ratio}"


def _ratio(_report: Report, variant: dict[str, Any]) -> str:
    ratio = variant.get("train_ratio")
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def _interval(key: str, digits: int) -> Cell:
    return lambda _report, variant: with_half(variant.get(key), digits)


def _share(key: str) -> Cell:
    return lambda _report, variant: percent(variant.get(key))


def _share_of(key: str) -> Cell:
    """A share and its interval in percent, without a sign."""

    def cell(_report: Report, variant: dict[str, Any]) -> str:
        value = variant.get(key)
        if value is None:
            return NOTHING
        half = NOTHING if value["half"] is None else f" ± {100 * value['half']:.1f}"
        return f"{100 * value['mean']:.1f} %{half}"

    return cell


def _number(key: str) -> Cell:
    return lambda _report, variant: count(variant[key])


COLUMNS: dict[str, dict[str, Cell]] = {
    "attention": {
        "": _label,
        "parameters": _parameters,
        "cache per layer": _cache,
        "bytes per token": _bytes,
        "seeds": _seeds,
        "held-out loss": _loss,
        "minus MHA": _difference,
        "pooled": _pooled,
        "recall": _share_of("recall"),
        "copying": _share_of("copying"),
        "decode, ms": _decode,
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
        "draft acceptance": _interval("acceptance_mean", 3),
        "draft accuracy": _interval("draft_hits_mean", 3),
        "main accuracy": _interval("main_hits_mean", 3),
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
    "seeds",
    "recall",
    "copying",
    "pooled",
    "worst layer",
    "worst layer, held out",
    "main model",
    "module",
    "draft accuracy",
    "main accuracy",
    "train tok/s",
)
"""Columns that do not fit a terminal."""
TERMINAL_ONLY = ("train",)
"""Columns that replace them in a terminal."""
