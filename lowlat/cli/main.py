"""The `lowlat` command: one app, its table of verbs, and how errors end the program.

Owns no verb. Verbs import torch inside their functions, so that --help and --version stay quick.
"""

import atexit
import gc
import sys
import traceback
from importlib.metadata import version
from typing import Annotated

import typer
from typer.exceptions import TyperException

from lowlat.cli.bench import bench
from lowlat.cli.chat import chat
from lowlat.cli.compare import compare
from lowlat.cli.convert import convert
from lowlat.cli.data import app as data
from lowlat.cli.eval import evaluate
from lowlat.cli.generate import generate
from lowlat.cli.info import info
from lowlat.cli.plan import plan
from lowlat.cli.serve import serve
from lowlat.cli.stdio import abandon_output, open_streams
from lowlat.cli.train import app as train
from lowlat.utils.errors import UserError

USER_ERROR = 2
UNEXPECTED = 70
"""What sysexits.h calls an internal fault of the program; Python's own 1 is compare's verdict."""
FIRST_COLLECTION = 300_000
"""New objects before Python looks for cycles among them the first time."""

app = typer.Typer(
    name="lowlat",
    help="Multi-head Latent Attention models: load, convert, train, serve, talk to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat)
app.command("generate")(generate)
app.command("serve")(serve)
app.command("info")(info)
app.command("convert")(convert)
app.command("compare")(compare)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("plan")(plan)
app.add_typer(data)
app.add_typer(train, name="train")


def print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"lowlat {version('lowlat')}")
        raise typer.Exit
    return wanted


@app.callback()
def lowlat(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def put_off_collections() -> None:
    """Look for garbage late the first time, then as usual among newer objects, and not at the end.

    Imports make a hundred thousand objects that stay; looking through them again and again would
    be a third of the time of a short run.
    """
    usual = gc.get_threshold()

    def resume(phase: str, _: dict[str, int]) -> None:
        if phase == "stop":
            gc.callbacks.remove(resume)
            gc.freeze()
            gc.set_threshold(*usual)

    gc.callbacks.append(resume)
    gc.set_threshold(FIRST_COLLECTION)
    atexit.register(gc.freeze)


def run() -> None:
    """Entry point of `lowlat`."""
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """Run a command-line app to its end.

    Exit codes: 0 done, 2 an error in what the user gave, 70 an unexpected one (with its traceback),
    130 interrupted; verbs that judge (compare) end with 1 where the verdict is no.
    """
    put_off_collections()
    open_streams()
    try:
        try:
            sys.exit(app(standalone_mode=False) or 0)
        finally:
            # A fault of the output is told here; later it would be Python's to tell.
            sys.stdout.flush()
    except UserError as error:
        print(f"lowlat: error: {error}", file=sys.stderr)
        abandon_output()
        sys.exit(USER_ERROR)
    except BrokenPipeError:
        abandon_output()
        sys.exit(1)
    except TyperException as error:
        if told := usage_fault(error):
            print(f"lowlat: error: {told}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        abandon_output()
        sys.exit(UNEXPECTED)


def usage_fault(error: TyperException) -> str:
    """What is wrong with the command line, in one line with where to read on; empty where the help
    has been printed instead.
    """
    told = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    if not told or context is None:
        return told
    end = "" if told[-1] in ".?" else ";"
    return f"{told}{end} {context.command_path} --help tells more"
