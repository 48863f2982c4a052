"""Tables of a study report for the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from lowlat.train.metrics.formatting import count
from lowlat_lab.study.cells import comparison_table, table_of
from lowlat_lab.study.report import Report
from lowlat_lab.study.statistics import confidence


def show(report: Report, console: Console | None = None) -> None:
    """Print setting, results, comparisons and failures."""
    console = Console() if console is None else console
    console.print(heading(report), highlight=False, markup=False)
    console.print()
    console.print(_table(*table_of(report, narrow=True)))
    console.print(_table(*comparison_table(report)))
    times = [time for variant in report["variants"] for time in variant.get("decode", [])]
    if not all(time["is_measured"] for time in times):
        console.print("* estimated from the roofline", highlight=False)
    for failure in report["failures"]:
        console.print(failure_text(failure), style="red", highlight=False, markup=False)


def heading(report: Report) -> str:
    """The setting, in two lines."""
    size, data = report["size"], report["data"]
    seeds = len(report["seeds"])
    return "\n".join(
        [
            f"{report['study']} study, size {size['name']}: {size['num_hidden_layers']} layers of "
            f"{size['hidden_size']}, {report['steps']:,} steps, {count(report['tokens'])} tokens "
            f"of {data['folder']} a run, {seeds} seed{'s' if seeds > 1 else ''}",
            f"losses in nats per token on {report['held_out_windows']:,} held-out windows of "
            f"{size['sequence_length']}, ± {confidence()} confidence over seeds",
        ]
    )


def failure_text(failure: dict[str, object]) -> str:
    """'mla, seed 2: failed: ...'."""
    seed = "" if failure["seed"] is None else f", seed {failure['seed']}"
    return f"{failure['variant']}{seed}: failed: {failure['reason']}"


def _table(headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, heading in enumerate(headings):
        wide = max((len(row[place]) for row in rows), default=0)
        table.add_column(heading, justify="right" if place else "left", min_width=wide)
    for row in rows:
        table.add_row(*row)
    return table
