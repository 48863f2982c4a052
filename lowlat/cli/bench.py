"""`lowlat bench`: throughput of lowlat and peer programs on the same weights."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowlat.cli import options
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.bench.benchmark_plan import BenchmarkPlan

# As in bench.benchmark_plan, whose import is slow for --help.
PREFILL = "512,2048,8192"
DECODE = "128,2048,8192,32768"
ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOptions:
    """What to measure; the arguments of `bench.benchmark_plan.make_plan`."""

    prefill: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help=f"Prompt lengths of prefill; '' for none. By default {PREFILL}, up to the model's "
            "context.",
        ),
    ] = None
    decode: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help=f"Tokens in the KV cache before a decode step; '' for none. By default {DECODE}, "
            "up to the model's context.",
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            help="Data type of the weights: bf16, int8, int4, fp8, fp32, or auto (bf16, and "
            "quantized weights as MODEL stores them)."
        ),
    ] = "auto"
    cache: Annotated[
        str,
        typer.Option(
            help="Data type of the KV cache: bf16, int8, or auto (fp32 with --dtype fp32, else "
            "bf16)."
        ),
    ] = "auto"
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="CPU threads, by default one per core. Several numbers show the scaling curve of "
            "lowlat and the phase that limits it.",
        ),
    ] = None
    peers: Annotated[
        str,
        typer.Option(
            metavar="NAME[=PYTHON],...",
            help="Also measure transformers, llama.cpp or vllm. PYTHON is the interpreter that has "
            "it, by default this one.",
        ),
    ] = ""
    rounds: Annotated[
        int, typer.Option(min=1, help="Measuring rounds, interleaved over the programs.")
    ] = ROUNDS


@options.with_option_groups
def bench(
    *,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, .gguf file, hub id, or 'default'.")
    ],
    benchmark: BenchmarkOptions,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also write results.json and plot.svg there."),
    ] = None,
    as_json: options.Json = False,
    parallel: options.Parallel = None,
) -> None:
    """Throughput of prefill and decode, compared with other programs and the roofline.

    Before anything is timed, the logits of all programs must agree in fp32. With --parallel, only
    lowlat is timed; memory, bytes and messages of each process are shown.
    """
    from lowlat.bench.benchmark_plan import make_plan
    from lowlat.bench.results_plot import require_matplotlib
    from lowlat.cli.inputs import process_threads
    from lowlat.cli.launch import one_process_per_node
    from lowlat.utils.process_group import is_follower, quiet_followers

    parallel = one_process_per_node(parallel)
    with quiet_followers():
        counts = _threads(benchmark, parallel)
        given: dict[str, Any] = asdict(benchmark)
        given["threads"] = process_threads(parallel, counts[-1] if counts else None)
        plan = make_plan(**given)
        if out is not None and not is_follower():
            require_matplotlib()
            make_folder(out)
    results, show, draw = _measured(model, plan, counts, parallel)
    # Printed before writing, so that a full disk loses no results.
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        show(results)
    if out is not None:
        text = json.dumps(results, indent=1) + "\n"
        try:
            (out / "results.json").write_text(text, encoding="utf-8")
            draw(results, out / "plot.svg")
        except OSError as error:
            raise UserError(
                f"--out {out}: the results cannot be written ({error.strerror}); they were printed"
            ) from error


def _threads(benchmark: BenchmarkOptions, parallel: str | None) -> list[int]:
    """The numbers of --threads; empty without it."""
    from lowlat.bench.benchmark_plan import parse_threads

    counts = [] if benchmark.threads is None else parse_threads(benchmark.threads)
    if len(counts) > 1 and parallel is not None:
        raise UserError("--threads with several numbers is for one process; give one number")
    if benchmark.peers and (len(counts) > 1 or parallel is not None):
        option = "--threads with several numbers" if parallel is None else "--parallel"
        raise UserError(f"{option} measures lowlat alone; leave out --peers")
    return counts


def _measured(
    model: str, plan: "BenchmarkPlan", counts: list[int], parallel: str | None
) -> tuple[
    dict[str, Any], Callable[[dict[str, Any]], None], Callable[[dict[str, Any], Path], None]
]:
    """The results, and the functions that print and draw them."""
    from lowlat.bench.parallel import bench_parallel
    from lowlat.bench.results_plot import draw, draw_scaling
    from lowlat.bench.results_table import show
    from lowlat.bench.run import bench as run
    from lowlat.bench.scaling import bench_scaling, show_scaling
    from lowlat.cli.inputs import process_progress

    progress = process_progress()
    if len(counts) > 1:
        return bench_scaling(model, plan, counts, progress), show_scaling, draw_scaling
    if parallel is not None:
        return bench_parallel(model, plan, parallel, progress), show, draw
    return run(model, plan, progress), show, draw


def make_folder(folder: Path) -> None:
    """Create `folder`. Raises UserError where it cannot be created or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be created ({error.strerror})") from error
    for name in ("results.json", "plot.svg"):
        try:
            (folder / name).open("ab").close()
        except OSError as error:
            raise UserError(
                f"--out {folder}: {name} cannot be written there ({error.strerror}); "
                "give another folder"
            ) from error
