"""A report as tables for people. Owns wording and layout; every figure is the report's."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Report = dict[str, Any]


def show(report: Report, console: Console | None = None) -> None:
    """Print the report."""
    console = Console() if console is None else console
    console.print(heading(report), highlight=False)
    for table in (rates(report), *([starts(report)] if report["start_to_first_token"] else [])):
        console.print()
        console.print(table)
    for line in notes(report):
        console.print(line, highlight=False, markup=False)


def heading(report: Report) -> str:
    """Model, machine and its measured limits, a line each."""
    model, machine, plan = report["model"], report["machine"], report["plan"]
    limits = report["calibration"]["median"]
    gemm = ", ".join(
        f"{name.removeprefix('gemm_')} {limits[name] / 1e9:,.0f}"
        for name in ("gemm_fp32", "gemm_bf16", "gemm_int8")
    )
    return "\n".join(
        [
            f"{model['path']}: {model['parameters'] / 1e6:,.1f}M parameters, "
            f"{model['active_parameters'] / 1e6:,.1f}M active; {plan['dtype']} weights, "
            f"{plan['cache']} cache of {model['cache_bytes_per_token']:,} bytes per token",
            f"{machine['cpu']} ({', '.join(machine['flags'])}), kernels: {machine['isa']}, "
            f"{plan['threads']} threads; commit {machine['commit']}",
            f"memory read {limits['bandwidth'] / 1e9:,.1f} GB/s; products {gemm} GFLOP/s",
        ]
    )


def rates(report: Report) -> Table:
    """Tokens per second: a block of lines per cell, one per program and the roofline.

    Behind the rate: half its spread over the rounds, its share of the roofline and of what weights
    and attention allow in turn, how many times faster lowlat is, and the most memory resident while
    a prompt was read.
    """
    table = _table("", "", "tok/s", "", "roof", "in turn", "lowlat", "memory")
    for cell in dict.fromkeys((row["kind"], row["tokens"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["kind"], row["tokens"]) == cell]
        rows.sort(key=lambda row: row["program"] != "lowlat")
        name = f"{cell[0]} {cell[1]:,}"
        for row in rows:
            table.add_row(name, row["program"], *_figures(row, rows[0]))
            name = ""
        table.add_row("", "roofline", _number(rows[0]["roofline_tokens_per_second"]), style="dim")
        table.add_section()
    return table


def starts(report: Report) -> Table:
    """Seconds from process start to first token."""
    table = _table("start to first token", "seconds")
    for name, taken in report["start_to_first_token"].items():
        table.add_row(name, f"{taken['seconds']:.2f}")
    return table


def notes(report: Report) -> list[str]:
    """What was not measured and why; how far the programs agree."""
    lines = []
    for name, program in report["programs"].items():
        reasons: dict[str, list[str]] = {}
        for row in report["rows"]:
            if row["program"] == name and row["not_measured"] is not None:
                cells = reasons.setdefault(row["not_measured"], [])
                cells.append(f"{row['kind']} {row['tokens']:,}")
        lines += [f"{name}: {why}: no {', '.join(cells)}" for why, cells in reasons.items()]
        facts = []
        if program["fp32_difference"] is not None:
            facts.append(f"checked against lowlat, difference {program['fp32_difference']:.1e}")
        if program["error_against_fp32"] is not None:
            facts.append(
                f"{program['precision']} logits off by {program['error_against_fp32']:.1%}"
            )
        if facts:
            lines.append(f"{name}: {'; '.join(facts)}")
    return lines


def _figures(row: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """A line of the table; '-' where nothing was measured. `own` is lowlat's row of the cell."""
    rate, peak = row["tokens_per_second"], row["peak_bytes"]
    if rate is None:
        return ["-"]
    faster = own["tokens_per_second"] / rate if own["tokens_per_second"] and row != own else None
    return [
        _number(rate),
        f"±{row['spread'] / 2:.0%}",
        f"{row['share_of_roofline']:.0%}",
        f"{row['share_in_turn']:.0%}",
        "" if faster is None else f"{faster:.2f} x",
        f"{peak / 1e9:.2f} GB" if peak else "",
    ]


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:,.1f}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold cyan")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place > 1 else "left", no_wrap=True)
    return table
