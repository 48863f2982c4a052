"""`lowlat train report`: summary of training runs as a table, a plot and JSON."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lowlat.cli import options


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Run folder, finished or still training; several are compared.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Plot file: .png, .svg or .pdf; a name without a suffix gives a .png and an .svg. "
            "The figures are written next to it as .json. By default a single run gets report.png, "
            "report.svg and report.json in its folder.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Final and best losses, speed and expert balance, with plots of the whole run.

    Losses are in nats per token. MFU is relative to the rate of matrix products measured on this
    machine. MaxVio is the maximum load of an expert over the mean load, minus 1.
    """
    from rich.console import Console

    from lowlat.train.metrics.lines import plain
    from lowlat.train.metrics.plot import available, draw
    from lowlat.train.metrics.summary import summarise
    from lowlat.train.metrics.training_report import (
        pictures,
        read_runs,
        table,
        write_json,
        write_report,
    )

    files = [] if out is None else pictures(out)
    histories = read_runs(runs)
    summaries = {label: summarise(history) for label, history in histories.items()}
    if as_json:
        print(json.dumps(plain(summaries), allow_nan=False, indent=2))
    else:
        Console().print(table(summaries))
    if files:
        draw(histories, files)
        files.append(write_json(summaries, files[0].with_suffix(".json")))
    elif len(runs) > 1:
        _print_note("no plot of several runs without --out FILE")
    elif not available():
        _print_note("no plot: matplotlib is not installed (pip install lowlat[train])")
    else:
        files = write_report(*histories.values())
    if files:
        _print_note(f"wrote {', '.join(map(str, files))}")


def _print_note(text: str) -> None:
    """Print to stderr: stdout has only the table or the JSON."""
    print(text, file=sys.stderr)
