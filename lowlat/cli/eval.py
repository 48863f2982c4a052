"""`lowlat eval`: how well a model predicts a text file."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lowlat.cli import options


def evaluate(
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", help="UTF-8 text file.", show_default=False)
    ],
    model: options.Model = options.DEFAULT_MODEL,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens per window; windows do not overlap and share no context. By default 1024, "
            "or the model's context where that is less.",
            show_default=False,
        ),
    ] = None,
    device: options.Device = options.DEFAULT_DEVICE,
    dtype: options.Dtype = options.DEFAULT_DTYPE,
    cache: options.Cache = options.DEFAULT_CACHE,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Perplexity and bits per byte of a text.

    The first token of each window is given, every other one is predicted from those before it.
    """
    from lowlat.cli.eval_report import as_dict, measure, print_text
    from lowlat.cli.inputs import load_model, read_text_file

    content = read_text_file(text)
    loaded = load_model(model, dtype=dtype, cache=cache, device=device, threads=threads)
    result = measure(loaded, str(text), content, window)
    if as_json:
        print(json.dumps(as_dict(result), indent=2))
    else:
        print_text(result)
