"""`lowlat bench`: lowlat and other programs on the same weights, against the machine's limits."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lowlat.cli import options
from lowlat.utils.errors import UserError

# As in bench.plan, which would bring in more than --help needs.
PREFILL = "512,2048,8192"
DECODE = "128,2048,8192,32768"
ROUNDS = 3


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Checkpoint folder, hub id, or 'default'.", show_default=False
        ),
    ],
    prefill: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help=f"Prompt lengths; '' for none, by default {PREFILL} as far as the model goes.",
            show_default=False,
        ),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Tokens in the cache before a step; '' for none, by default "
            f"{DECODE} as far as the model goes.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Weights: bf16, int8, int4, fp8 or fp32.")] = "bf16",
    cache: Annotated[
        str,
        typer.Option(help="Cached rows: bf16, int8, or auto (fp32 with --dtype fp32, else bf16)."),
    ] = "auto",
    threads: options.Threads = None,
    peers: Annotated[
        str,
        typer.Option(
            metavar="NAME[=PYTHON],...",
            help="Also measure transformers, llama.cpp or vllm; PYTHON is the interpreter that has "
            "it, by default this one.",
        ),
    ] = "",
    rounds: Annotated[
        int, typer.Option(min=1, help="Times everything is measured, programs in turn.")
    ] = ROUNDS,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Also write results.json and plot.svg there.", show_default=False
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Tokens per second over context, beside other programs and the roofline of this machine.

    All programs must agree in fp32 before anything is timed.
    """
    from lowlat.bench.benchmark_plan import make_plan
    from lowlat.bench.results_plot import draw, require_matplotlib
    from lowlat.bench.results_table import show
    from lowlat.bench.run import bench as run
    from lowlat.utils.progress import make_progress

    plan = make_plan(
        prefill=prefill,
        decode=decode,
        dtype=dtype,
        cache=cache,
        threads=threads,
        peers=peers,
        rounds=rounds,
    )
    if out is not None:
        require_matplotlib()
        make_folder(out)
    report = run(model, plan, make_progress())
    # Printed first: minutes of measuring are not lost to a full disk.
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    if out is not None:
        text = json.dumps(report, indent=1) + "\n"
        try:
            (out / "results.json").write_text(text, encoding="utf-8")
            draw(report, out / "plot.svg")
        except OSError as error:
            raise UserError(
                f"--out {out}: the report cannot be written ({error.strerror}); it was printed all "
                "the same"
            ) from error


def make_folder(folder: Path) -> None:
    """Create `folder` if it is not there. Raises UserError where it cannot be, or be written in."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be a folder ({error.strerror})") from error
    for name in ("results.json", "plot.svg"):
        try:
            (folder / name).open("ab").close()
        except OSError as error:
            raise UserError(
                f"--out {folder}: {name} cannot be written there ({error.strerror}); "
                "give another folder"
            ) from error
