"""The `lowlat-lab` command: ablation studies, corpora and pages of lowlat's published results."""

import typer

from lowlat.cli.main import run_app
from lowlat_lab.cli.collect import collect
from lowlat_lab.cli.page import app as page
from lowlat_lab.cli.study import app as study

app = typer.Typer(
    name="lowlat-lab",
    help="Studies, corpora and result pages of lowlat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(study, name="study")
app.add_typer(page, name="page")
app.command("collect")(collect)


def run() -> None:
    """Entry point, with the exit codes of `lowlat`."""
    run_app(app)
