"""`lowlat compare`: two models or implementations, part by part, and which known mistake it is."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowlat.cli import options
from lowlat.cli.stdio import abandon_output
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.compare.implementations.base import Implementation
    from lowlat.compare.implementations.spec import ImplementationSpec
    from lowlat.compare.trace import Window

TOKENS = 64
WINDOW = 64
DIFFERENT = 1


def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="What is compared with: NAME, transformers:NAME, official:MODEL.PY:NAME or "
            "gguf:FILE, with options behind an @.",
            show_default=False,
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What is examined.", show_default=False)],
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="UTF-8 text to read instead of random tokens.", show_default=False
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1 << 24,
            help="Tokens to read; a last window of one is left out.",
        ),
    ] = TOKENS,
    window: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Tokens read together; memory grows with its square."
        ),
    ] = WINDOW,
    start: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Position of the first token: far ones show other mistakes."
        ),
    ] = 0,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=(1 << 63) - 1,
            help="Of the random tokens; 0 by default.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            help="Largest relative difference of equal parts; by default that of the coarser "
            "number type.",
            show_default=False,
        ),
    ] = None,
    impose_experts: Annotated[
        bool, typer.Option("--impose-experts", help="B uses the experts that A chose.")
    ] = False,
    every_part: Annotated[
        bool, typer.Option("--all", help="List every part of every layer.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the differences over the layers.", show_default=False
        ),
    ] = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Where two models or implementations first differ, by how much, and by which known mistake.

    NAME is any model that lowlat loads. Behind its @: a number type (fp32, which is the default,
    fp64, bf16, fp16, int8, int4, fp8, auto), a form of attention (absorbed, expanded, stream),
    native (the kernels instead of plain PyTorch), cache-int8. So: lowlat compare M@bf16 M@int8,
    M@absorbed M@expanded, M@bf16 M@native, M transformers:M. transformers and official take a
    number type.

    Exit code: 0 equal within the tolerance, 1 different, 2 a fault in what was given or of the
    implementation that is compared with, 70 one that nobody expected, with its traceback.
    """
    from lowlat.compare.implementations.spec import parse
    from lowlat.compare.result_json import as_dict
    from lowlat.compare.result_plot import check_ending, draw, require_matplotlib
    from lowlat.compare.run import compare as run
    from lowlat.ops import native
    from lowlat.utils.progress import make_progress

    specs = parse(a), parse(b)
    if not (tolerance is None or math.isfinite(tolerance)):
        raise UserError(f"--tolerance must be a finite number, got {tolerance}")
    if text is not None and seed is not None:
        raise UserError("--seed is of random tokens, and --text is read instead; leave one out")
    if plot is not None:
        require_matplotlib()
        check_ending(plot)
        if not plot.absolute().parent.is_dir():
            raise UserError(f"--plot {plot}: its folder is not there; make it first")
    if threads is not None:
        native.use_threads(threads)
    sides, read = _inputs(specs, text, tokens, window, start, seed or 0)
    found = run(
        *sides,
        read,
        tolerance=tolerance,
        impose_experts=impose_experts,
        progress=make_progress(),
    )
    report = as_dict(found)
    if plot is not None:
        draw(report, plot)
    _print(report, every_part=every_part, as_json=as_json)
    if not found.equal:
        raise typer.Exit(DIFFERENT)


def _inputs(
    specs: "tuple[ImplementationSpec, ImplementationSpec]",
    text: Path | None,
    tokens: int,
    window: int,
    start: int,
    seed: int,
) -> "tuple[tuple[Implementation, Implementation], list[Window]]":
    """Both sides, loaded, and what they read."""
    from lowlat.cli.inputs import read_text_file
    from lowlat.compare.implementations.open import open_implementation
    from lowlat.compare.inputs import random_ids, text_ids, windows
    from lowlat.compare.run import check_pair
    from lowlat.utils.progress import make_progress

    # First, because it fails in milliseconds.
    content = None if text is None else read_text_file(text)
    progress = make_progress()
    (a, path_a), (b, path_b) = (open_implementation(spec, progress) for spec in specs)
    check_pair(a, b)
    if content is None:
        ids = random_ids(a.config.vocab_size, tokens, seed)
    else:
        ids = text_ids(content, str(text), tokens, (path_a, path_b))
    return (a, b), windows(ids, window, start, (a, b))


def _print(report: dict[str, Any], *, every_part: bool, as_json: bool) -> None:
    """Print the report. A reader that leaves before its end changes no diagnosis."""
    from rich.console import Console

    from lowlat.compare.result_table import show

    if as_json:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    else:
        # Rich ends the program with 1, which says different, where its reader has gone.
        console = Console()
        with console.capture() as captured:
            show(report, console, every_part=every_part)
        text = captured.get()
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        abandon_output()
