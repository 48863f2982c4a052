"""Tables of a comparison for the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lowlat.compare.result_text import diagnosis_lines, figure, headline, notes, routing_lines

Object = dict[str, Any]


def show(result: Object, console: Console | None = None, *, every_part: bool = False) -> None:
    """Print layers, the parts of the first layer that differs, logits and diagnosis.

    With `every_part`, list all parts of all blocks instead.
    """
    console = Console() if console is None else console
    for line in heading(result):
        console.print(line, highlight=False, markup=False)
    tables = [parts(result, result["parts"])] if every_part else _summary(result)
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    good = result["equal"]
    console.print(headline(result), style="bold green" if good else "bold red", highlight=False)
    for line in (*diagnosis_lines(result), *routing_lines(result), *notes(result)):
        console.print(line, highlight=False, markup=False)


def heading(result: Object) -> list[str]:
    """Both implementations and their input tokens."""
    a, b = result["a"], result["b"]
    windows = f" in {result['windows']} windows" if result["windows"] > 1 else ""
    imposed = ", A's experts imposed on B" if result["experts_imposed"] else ""
    return [
        f"A  {a['name']} ({_precision(a)})",
        f"B  {b['name']} ({_precision(b)})",
        f"{result['tokens']:,} tokens{windows} from position {result['start']:,}, "
        f"tolerance {result['tolerance']:g}{imposed}",
    ]


def _precision(implementation: Object) -> str:
    cache = "" if implementation["cache"] is None else f", {implementation['cache']} KV cache"
    return f"{implementation['precision']}{cache}"


def _summary(result: Object) -> list[Table]:
    tables = [layers(result)] if any(p["stage"] == "layer" for p in result["parts"]) else []
    first = result["first_difference"]
    if first is not None:
        own = [item for item in result["parts"] if item["block"] == first["block"]]
        tables.append(parts(result, own))
    return [*tables, logits(result)]


def layers(result: Object) -> Table:
    """A line per layer: its output, and the part with the largest difference."""
    changed = {item["block"]: item for item in result["experts"]}
    columns = ("", "residual", "cosine", "worst part", "relative")
    table = _table(*columns, *(["experts changed"] if changed else []))
    blocks: dict[str, list[Object]] = {}
    for item in result["parts"]:
        if item["stage"] in ("layer", "mtp"):
            blocks.setdefault(item["block"], []).append(item)
    for block, own in blocks.items():
        residual = next((item for item in own if item["part"] == "residual"), None)
        worst = max(own, key=lambda item: _size(item["relative"]))
        experts = changed.get(block)
        table.add_row(
            block,
            *(["-", "-"] if residual is None else _figures(residual, result)[:2]),
            worst["part"],
            _marked(worst["relative"], result),
            *([] if experts is None else [f"{experts['changed']:,} of {experts['chosen']:,}"]),
        )
    return table


def parts(result: Object, listed: list[Object]) -> Table:
    """A line per part, in order of computation."""
    table = _table("", "part", "relative", "max abs", "cosine")
    last = ""
    for item in listed:
        relative, cosine = _figures(item, result)
        name = item["block"] if item["block"] != last else ""
        table.add_row(name, item["part"], relative, figure(item["max_abs"]), cosine)
        last = item["block"]
    return table


def logits(result: Object) -> Table:
    """A line per LM head: the model's and those of MTP modules."""
    table = _table("logits", "relative", "max abs", "cosine", "KL", "top-1 agreement")
    found = {item["block"]: item for item in result["parts"] if item["part"] == "logits"}
    for item in result["logits"]:
        own = found[item["block"]]
        relative, cosine = _figures(own, result)
        name = "model" if item["block"] == "output" else item["block"]
        kl, same = figure(item["kl"]), f"{item['top1_agreement']:.1%}"
        table.add_row(name, relative, figure(own["max_abs"]), cosine, kl, same)
    return table


def _figures(item: Object, result: Object) -> tuple[str, str]:
    cosine = item["cosine"]
    return _marked(item["relative"], result), "-" if cosine is None else f"{cosine:.6f}"


def _marked(relative: float | None, result: Object) -> str:
    beyond = _size(relative) > result["tolerance"]
    return f"[red]{figure(relative)}[/red]" if beyond else figure(relative)


def _size(relative: float | None) -> float:
    return float("inf") if relative is None else relative


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold cyan")
    words = ("", "part", "worst part", "logits")
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    return table
