"""A report as tables for people. Owns layout; every figure is the report's."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lowlat.compare.wording import choices, figure, headline, notes, verdicts

Object = dict[str, Any]


def show(report: Object, console: Console | None = None, *, every_part: bool = False) -> None:
    """Print the report: layers, the parts of the layer where it begins to differ, logits, verdict.

    `every_part` lists all parts of all blocks instead.
    """
    console = Console() if console is None else console
    for line in heading(report):
        console.print(line, highlight=False, markup=False)
    tables = [parts(report, report["parts"])] if every_part else _summary(report)
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    good = report["equal"]
    console.print(headline(report), style="bold green" if good else "bold red", highlight=False)
    for line in (*verdicts(report), *choices(report), *notes(report)):
        console.print(line, highlight=False, markup=False)


def heading(report: Object) -> list[str]:
    """The sides, and what they read."""
    a, b = report["a"], report["b"]
    windows = f" in {report['windows']} windows" if report["windows"] > 1 else ""
    imposed = ", A's experts imposed on B" if report["experts_imposed"] else ""
    return [
        f"A  {a['name']} ({_numbers(a)})",
        f"B  {b['name']} ({_numbers(b)})",
        f"{report['tokens']:,} tokens{windows} from position {report['start']:,}, "
        f"tolerance {report['tolerance']:g}{imposed}",
    ]


def _numbers(side: Object) -> str:
    cache = "" if side["cache"] is None else f" with its cache in {side['cache']}"
    return f"{side['precision']}{cache}"


def _summary(report: Object) -> list[Table]:
    tables = [layers(report)] if any(p["stage"] == "layer" for p in report["parts"]) else []
    first = report["first_difference"]
    if first is not None:
        own = [item for item in report["parts"] if item["block"] == first["block"]]
        tables.append(parts(report, own))
    return [*tables, logits(report)]


def layers(report: Object) -> Table:
    """A line per layer: its output, and the part that differs most."""
    changed = {item["block"]: item for item in report["experts"]}
    columns = ("", "residual", "cosine", "worst part", "relative")
    table = _table(*columns, *(["experts changed"] if changed else []))
    blocks: dict[str, list[Object]] = {}
    for item in report["parts"]:
        if item["stage"] in ("layer", "mtp"):
            blocks.setdefault(item["block"], []).append(item)
    for block, own in blocks.items():
        residual = next((item for item in own if item["part"] == "residual"), None)
        worst = max(own, key=lambda item: _size(item["relative"]))
        experts = changed.get(block)
        table.add_row(
            block,
            *(["-", "-"] if residual is None else _figures(residual, report)[:2]),
            worst["part"],
            _marked(worst["relative"], report),
            *([] if experts is None else [f"{experts['changed']:,} of {experts['chosen']:,}"]),
        )
    return table


def parts(report: Object, listed: list[Object]) -> Table:
    """A line per part, in order of computation."""
    table = _table("", "part", "relative", "largest", "cosine")
    last = ""
    for item in listed:
        relative, cosine = _figures(item, report)
        name = item["block"] if item["block"] != last else ""
        table.add_row(name, item["part"], relative, figure(item["max_abs"]), cosine)
        last = item["block"]
    return table


def logits(report: Object) -> Table:
    """A line per head: the model's and those of MTP modules."""
    table = _table("logits", "relative", "largest", "cosine", "KL", "same likeliest")
    found = {item["block"]: item for item in report["parts"] if item["part"] == "logits"}
    for item in report["logits"]:
        own = found[item["block"]]
        relative, cosine = _figures(own, report)
        name = "model" if item["block"] == "output" else item["block"]
        kl, same = figure(item["kl"]), f"{item['same_likeliest']:.1%}"
        table.add_row(name, relative, figure(own["max_abs"]), cosine, kl, same)
    return table


def _figures(item: Object, report: Object) -> tuple[str, str]:
    cosine = item["cosine"]
    return _marked(item["relative"], report), "-" if cosine is None else f"{cosine:.6f}"


def _marked(relative: float | None, report: Object) -> str:
    beyond = _size(relative) > report["tolerance"]
    return f"[red]{figure(relative)}[/red]" if beyond else figure(relative)


def _size(relative: float | None) -> float:
    return float("inf") if relative is None else relative


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold cyan")
    words = ("", "part", "worst part", "logits")
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    return table
