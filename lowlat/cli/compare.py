"""`lowlat compare`: find and diagnose the first difference of two implementations of a model."""

import json
import math
from dataclasses import dataclass
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

DIFFERENT = 1


Reference = Annotated[
    str,
    typer.Argument(
        metavar="A",
        help="The reference: NAME, transformers:NAME, official:MODEL.PY:NAME or gguf:FILE, each "
        "with @OPTIONS.",
    ),
]
Checked = Annotated[str, typer.Argument(metavar="B", help="The implementation to check.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class InputOptions:
    """The tokens that both implementations run."""

    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run a UTF-8 text instead of random tokens.")
    ] = None
    tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1 << 24,
            help="Number of tokens; a last window of one token is dropped.",
        ),
    ] = 64
    window: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Tokens per window; memory grows with its square."),
    ] = 64
    start: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Position of the first token. Position 0 hides RoPE mistakes.",
        ),
    ] = 0
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=(1 << 63) - 1, help="Seed of the random tokens, by default 0."),
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputOptions:
    every_part: Annotated[bool, typer.Option("--all", help="List every part of every layer.")] = (
        False
    )
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plot the differences over the layers.")
    ] = None
    as_json: options.Json = False


@options.with_option_groups
def compare(
    *,
    a: Reference,
    b: Checked,
    inputs: InputOptions,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            help="Relative difference up to which parts are equal, by default that of the coarser "
            "data type.",
        ),
    ] = None,
    impose_experts: Annotated[
        bool, typer.Option("--impose-experts", help="Route B with the experts that A selects.")
    ] = False,
    threads: options.Threads = None,
    output: OutputOptions,
) -> None:
    """Find the first difference of two implementations of a model, its size and its cause.

    NAME is any model that lowlat loads. Options after @: a data type (fp32 by default, fp64,
    bf16, fp16, int8, int4, fp8, auto), an attention path (absorbed, expanded, decode), native (the
    native kernels instead of plain PyTorch), cache-int8 or cache-bf16. Examples: lowlat compare
    M@bf16 M@int8, M@absorbed M@expanded, M@bf16 M@native, M transformers:M. transformers and
    official take a data type only.

    Exit code: 0 equal within the tolerance, 1 different, 2 wrong input or a peer that fails, 70 an
    unexpected error, with its traceback.
    """
    from lowlat.compare.implementations.spec import parse
    from lowlat.compare.result_json import as_dict
    from lowlat.compare.result_plot import draw
    from lowlat.compare.run import compare as run
    from lowlat.compare.weights.run import compare_weights
    from lowlat.ops import native
    from lowlat.utils.progress import make_progress

    specs = parse(a), parse(b)
    _check(inputs, output, tolerance)
    if threads is not None:
        native.use_threads(threads)
    pair, paths, windows = _load(specs, inputs)
    progress = make_progress()
    found = run(
        *pair,
        windows,
        tolerance=tolerance,
        impose_experts=impose_experts,
        weights=compare_weights(*paths, progress),
        progress=progress,
    )
    result = as_dict(found)
    if output.plot is not None:
        draw(result, output.plot)
    _print(result, every_part=output.every_part, as_json=output.as_json)
    if not found.equal:
        raise typer.Exit(DIFFERENT)


def _check(inputs: InputOptions, output: OutputOptions, tolerance: float | None) -> None:
    """Raises UserError for wrong options; called before anything is loaded."""
    from lowlat.compare.result_plot import check_ending, require_matplotlib

    if not (tolerance is None or math.isfinite(tolerance)):
        raise UserError(f"--tolerance must be a finite number, got {tolerance}")
    if inputs.text is not None and inputs.seed is not None:
        raise UserError("--seed is for random tokens, which --text replaces; leave one out")
    if output.plot is not None:
        require_matplotlib()
        check_ending(output.plot)
        if not output.plot.absolute().parent.is_dir():
            raise UserError(f"--plot {output.plot}: its folder does not exist; create it first")


def _load(
    specs: "tuple[ImplementationSpec, ImplementationSpec]", inputs: InputOptions
) -> "tuple[tuple[Implementation, Implementation], tuple[Path, Path], list[Window]]":
    """Both implementations, their checkpoints, and their input."""
    from lowlat.cli.inputs import read_text_file
    from lowlat.compare.implementations.open import open_implementation
    from lowlat.compare.inputs import random_ids, text_ids, windows
    from lowlat.compare.run import check_pair
    from lowlat.utils.progress import make_progress

    # First, because it fails within milliseconds.
    content = None if inputs.text is None else read_text_file(inputs.text)
    progress = make_progress()
    (a, path_a), (b, path_b) = (open_implementation(spec, progress) for spec in specs)
    check_pair(a, b)
    if content is None:
        ids = random_ids(a.config.vocab_size, inputs.tokens, inputs.seed or 0)
    else:
        ids = text_ids(content, str(inputs.text), inputs.tokens, (path_a, path_b))
    return (a, b), (path_a, path_b), windows(ids, inputs.window, inputs.start, (a, b))


def _print(result: dict[str, Any], *, every_part: bool, as_json: bool) -> None:
    """Print the report. A closed pipe does not change the exit code."""
    from rich.console import Console

    from lowlat.compare.result_text import show

    if as_json:
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    else:
        # On a closed pipe Rich exits with 1, which means "different".
        console = Console()
        with console.capture() as captured:
            show(result, console, every_part=every_part)
        text = captured.get()
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        abandon_output()
