"""Tables of benchmark results for the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Results = dict[str, Any]


def show(results: Results, console: Console | None = None) -> None:
    """Print heading, throughput, start times and notes."""
    console = Console() if console is None else console
    console.print(heading(results), highlight=False)
    for table in (
        throughput(results),
        *([starts(results)] if results["start_to_first_token"] else []),
        *([processes(results["parallel"])] if "parallel" in results else []),
    ):
        console.print()
        console.print(table)
    for line in notes(results):
        console.print(line, highlight=False, markup=False)


def heading(results: Results) -> str:
    """Model, machine and its measured peak rates, a line each."""
    model, machine, plan = results["model"], results["machine"], results["plan"]
    limits = results["calibration"]["median"]
    gemm = ", ".join(
        f"{name.removeprefix('gemm_')} {limits[name] / 1e9:,.0f}"
        for name in ("gemm_fp32", "gemm_bf16", "gemm_int8")
    )
    return "\n".join(
        [
            f"{model['path']}: {model['parameters'] / 1e6:,.1f}M parameters, "
            f"{model['active_parameters'] / 1e6:,.1f}M active; {plan['dtype']} weights, "
            f"{plan['cache']} KV cache of {model['cache_bytes_per_token']:,} bytes per token",
            f"{machine['cpu']} ({', '.join(machine['flags'])}), kernels: {machine['isa']}, "
            f"{machine['topology']}, {plan['threads']} threads; commit {machine['commit']}",
            f"peak: memory read {limits['bandwidth'] / 1e9:,.1f} GB/s; GEMM {gemm} GFLOP/s",
        ]
    )


def throughput(results: Results) -> Table:
    """Throughput in tokens per second: a block per case, with a line per program and the roofline.

    Columns after the rate: half its spread over the rounds, its shares of the roofline and of the
    serial bound, the speedup of lowlat, and the peak resident memory of prefill in GB.
    """
    table = new_table("", "", "tok/s", "", "roofline", "serial", "speedup", "GB")
    for case in dict.fromkeys((row["kind"], row["tokens"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["kind"], row["tokens"]) == case]
        rows.sort(key=lambda row: row["program"] != "lowlat")
        name = f"{case[0]} {case[1]:,}"
        for row in rows:
            table.add_row(name, row["program"], *_figures(row, rows[0]))
            name = ""
        table.add_row("", "roofline", number(rows[0]["roofline_tokens_per_second"]), style="dim")
        table.add_section()
    return table


def starts(results: Results) -> Table:
    """Seconds from process start to first token."""
    table = new_table("start to first token", "seconds")
    for name, taken in results["start_to_first_token"].items():
        table.add_row(name, f"{taken['seconds']:.2f}")
    return table


def processes(parallel: Results) -> Table:
    """Each process of a layout: its memory; per case the lower bound on the time of its part, bytes
    and messages that it sends per token, and those of the formula."""
    table = new_table("process", "case", "roofline", "bytes/token")
    table.title, table.title_justify = parallel["layout"], "left"
    for name in ("formula", "messages", "formula", "GB"):
        table.add_column(name, justify="right", no_wrap=True)
    for process in parallel["processes"]:
        rank = process["rank"]
        name, memory = f"{rank}", f"{process['memory_bytes'] / 1e9:.2f}"
        bounds = process["bound_seconds"].items()
        for (case, seconds), traffic in zip(bounds, parallel["traffic"], strict=True):
            sent = traffic["processes"][rank]
            figures = [number(sent["bytes"]), number(sent["formula_bytes"])]
            figures += [f"{sent[key]:.2f}" for key in ("messages", "formula_messages")]
            table.add_row(name, case, f"{seconds * 1e3:,.2f} ms", *figures, memory)
            name = memory = ""
    return table


def notes(results: Results) -> list[str]:
    """Cases that were not measured, with reasons; agreement of the programs."""
    lines = []
    for name, program in results["programs"].items():
        reasons: dict[str, list[str]] = {}
        for row in results["rows"]:
            if row["program"] == name and row["not_measured"] is not None:
                cases = reasons.setdefault(row["not_measured"], [])
                cases.append(f"{row['kind']} {row['tokens']:,}")
        lines += [
            f"{name}: {why}: not measured: {', '.join(cases)}" for why, cases in reasons.items()
        ]
        facts = []
        if program["fp32_difference"] is not None:
            facts.append(
                f"agrees with lowlat in fp32, largest difference {program['fp32_difference']:.1e}"
            )
        if program["error_against_fp32"] is not None:
            error = program["error_against_fp32"]
            facts.append(f"{program['precision']} logits differ from fp32 by {error:.1%}")
        if facts:
            lines.append(f"{name}: {'; '.join(facts)}")
    return lines


def _figures(row: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Cells of a line; '-' if it was not measured. `own`: lowlat's row of the case."""
    rate, peak = row["tokens_per_second"], row["peak_bytes"]
    if rate is None:
        return ["-"]
    faster = own["tokens_per_second"] / rate if own["tokens_per_second"] and row != own else None
    return [
        number(rate),
        f"±{row['spread'] / 2:.0%}",
        f"{row['share_of_roofline']:.0%}",
        f"{row['share_of_serial_bound']:.0%}",
        "" if faster is None else f"{faster:.2f}x",
        f"{peak / 1e9:.2f}" if peak else "",
    ]


def number(rate: float) -> str:
    """A rate with three digits or more."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:,.1f}"


def new_table(*columns: str) -> Table:
    """A table without lines: two columns of text, then numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold cyan")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place > 1 else "left", no_wrap=True)
    return table
