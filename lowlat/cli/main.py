"""Entry point of the `lowlat` command: verbs, exit codes and process-wide settings.

Verbs import torch inside their functions, so that --help and --version are fast.
"""

import atexit
import gc
import os
import sys
import traceback
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from lowlat.cli.bench import bench
from lowlat.cli.chat import app as chat
from lowlat.cli.compare import compare
from lowlat.cli.convert import convert
from lowlat.cli.data import app as data
from lowlat.cli.eval import evaluate
from lowlat.cli.generate import generate
from lowlat.cli.info import info
from lowlat.cli.models import app as models
from lowlat.cli.plan import app as plan
from lowlat.cli.serve import serve
from lowlat.cli.stdio import abandon_output, open_streams
from lowlat.cli.train import app as train
from lowlat.utils.errors import UserError

USER_ERROR = 2
UNEXPECTED = 70
"""EX_SOFTWARE of sysexits.h; Python's own 1 means "different" in compare."""
FIRST_COLLECTION = 300_000
"""New objects before the first garbage collection."""
TRAINING_VERBS = ("convert", "train")


class _Verbs(TyperGroup):
    """The verbs, with the process-wide settings of those that train."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, verb, rest = super().resolve_command(ctx, args)
        if name in TRAINING_VERBS:
            wait_passively()
        return name, verb, rest


app = typer.Typer(
    name="lowlat",
    cls=_Verbs,
    help="DeepSeek-V3 models (MLA, MoE, MTP): convert, train, serve, chat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(chat, name="chat")
app.command("generate")(generate)
app.command("serve")(serve)
app.command("info")(info)
app.command("convert")(convert)
app.command("compare")(compare)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.add_typer(models, name="models")
app.add_typer(plan)
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


def wait_passively() -> None:
    """Let OpenMP threads sleep between operators, unless OMP_WAIT_POLICY is set.

    Training alternates PyTorch operators and native kernels, which have their own thread pool;
    spinning OpenMP threads would compete with it for cores. Call before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def defer_garbage_collection() -> None:
    """Delay the first garbage collection, freeze the surviving objects, and skip the one at exit.

    Imports create about 100,000 permanent objects. Scanning them repeatedly takes a third of the
    time of a short run.
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
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """Run a command-line app to its end.

    Exit codes: 0 success, 1 different (compare), 2 wrong input, 70 unexpected error (with its
    traceback), 130 interrupted.
    """
    defer_garbage_collection()
    open_streams()
    try:
        try:
            sys.exit(app(standalone_mode=False) or 0)
        finally:
            # Report an output error here, not at interpreter exit.
            sys.stdout.flush()
    except UserError as error:
        print(f"lowlat: error: {error}", file=sys.stderr)
        abandon_output()
        sys.exit(USER_ERROR)
    except BrokenPipeError:
        abandon_output()
        sys.exit(1)
    except TyperException as error:
        if message := usage_error(error):
            print(f"lowlat: error: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        abandon_output()
        sys.exit(UNEXPECTED)


def usage_error(error: TyperException) -> str:
    """Error message of a wrong command line in one line, with a pointer to --help; empty if typer
    has already printed the help.
    """
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    if not message or context is None:
        return message
    message = message.removesuffix(".")
    end = "" if message[-1] == "?" else ";"
    return f"{message}{end} see {context.command_path} --help"
