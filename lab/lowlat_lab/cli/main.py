"""The `lowlat-lab` command: studies and corpora behind the results that lowlat publishes."""

import typer

from lowlat.cli.main import run_app
from lowlat_lab.cli.collect import collect
from lowlat_lab.cli.study import app as study

app = typer.Typer(
    name="lowlat-lab",
    help="Studies of attention and training, and the corpora that they train on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(study, name="study")
app.command("collect")(collect)


def run() -> None:
    """Entry point; exit codes as of `lowlat`."""
    run_app(app)
