"""`lowlat-lab page`: regenerate result pages and plots from recorded figures."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Write result pages and their plots again from recorded figures.", no_args_is_help=True
)

Figures = Annotated[Path, typer.Argument(metavar="FIGURES", help="JSON file of recorded figures.")]
Page = Annotated[
    Path, typer.Argument(metavar="PAGE", help="Page to update; hand-written text stays.")
]


@app.command("study")
def of_study(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="Report of a study.")],
) -> None:
    """Write the page and plot of a study next to its report."""
    from lowlat_lab.rewards import page as rewards
    from lowlat_lab.study import page as study

    found = json.loads(report.read_text(encoding="utf-8"))
    write = rewards.write_page if found["study"] == "rewards" else study.write_page
    write(found, report.with_suffix(".md"))


@app.command("conversion")
def conversion(figures: Figures, page: Page) -> None:
    """Fill the tables of the conversion page and draw its plots."""
    from lowlat_lab.pages.conversion import write_page

    write_page(json.loads(figures.read_text(encoding="utf-8")), page)
