"""`lowlat eval`: perplexity and bits per byte of a model on a text file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lowlat.cli import options


@options.with_option_groups
def evaluate(
    *,
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", help="UTF-8 text file.", show_default=False)
    ],
    model: options.Model = options.DEFAULT_MODEL,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens per window, without overlap or shared context. By default 1024, or the "
            "model's context if that is shorter.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
    machine: options.MachineOptions,
) -> None:
    """Perplexity and bits per byte of a text.

    Each token is predicted from the previous ones in its window; the first is not counted.
    """
    from lowlat.cli.eval_report import as_dict, measure, print_text
    from lowlat.cli.inputs import load_model, read_text_file

    content = read_text_file(text)
    result = measure(load_model(model, **asdict(machine)), str(text), content, window)
    if as_json:
        print(json.dumps(as_dict(result), indent=2))
    else:
        print_text(result)
