"""`lowlat train`: train a model from a recipe or resume from the last checkpoint; summarize runs;
export checkpoints.
"""

import json
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowlat.cli import options
from lowlat.cli.subverbs import with_subverbs

if TYPE_CHECKING:
    from lowlat.train.checkpoints.run_folder import RunFolder
    from lowlat.train.metrics.metrics_log import MetricsLog
    from lowlat.train.recipe.schema import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe in TOML.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Run folder, by default runs/NAME.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a recipe key: seed=1, phase.0.steps=50; may be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Estimate parameters, FLOPs, memory and time; do not train.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train a model from RECIPE. The same command resumes an interrupted run.

    Ctrl-C writes a checkpoint and stops. The trained model is written to FOLDER/model, which
    lowlat chat and lowlat serve load.
    """
    from lowlat.cli.inputs import recipe_checkpoint
    from lowlat.train.recipe.schema import read_recipe
    from lowlat.train.recipe.toml import text_of
    from lowlat.utils.progress import make_progress

    parsed = read_recipe(recipe, changes or [])
    progress = make_progress(quiet=quiet)
    _check_device(parsed, recipe)
    base_model = recipe_checkpoint(recipe, "base_model", parsed.base_model, progress)
    taught_by = None if parsed.distillation is None else parsed.distillation.teacher
    teacher = recipe_checkpoint(recipe, "distillation.teacher", taught_by, progress)
    if dry_run:
        from lowlat.cli.train_dry_run import print_dry_run

        return print_dry_run(parsed, recipe, base_model, teacher)
    text = text_of(recipe, changes or [])
    _run(parsed, recipe, text, out or Path("runs") / parsed.name, base_model, teacher, quiet)
    return None


def _check_device(parsed: "Recipe", recipe: Path) -> None:
    from lowlat.utils.device import parse_device
    from lowlat.utils.errors import UserError

    try:
        parse_device(parsed.device)
    except UserError as error:
        what = f"device = '{parsed.device}' is not available; set cpu, or cuda on a GPU machine"
        raise UserError(f"{recipe}: {what}") from error


def _run(
    parsed: "Recipe",
    recipe: Path,
    text: str,
    folder: Path,
    base_model: Path | None,
    teacher: Path | None,
    quiet: bool,
) -> None:
    from lowlat.train.checkpoints.run_folder import RunFolder
    from lowlat.train.parallel.launch import process_mesh
    from lowlat.train.run.trainer import Trainer
    from lowlat.utils.progress import make_progress

    with process_mesh(parsed.parallel, device=parsed.device, origin=str(recipe)) as mesh:
        quiet = quiet or not mesh.is_main_process
        with ExitStack() as held:
            run = RunFolder(folder)
            if mesh.is_main_process:
                held.enter_context(run)
            log = held.enter_context(closing(_log(parsed, run, quiet)))
            mesh.barrier()
            trainer = Trainer(
                parsed,
                run,
                log,
                base=recipe.parent,
                base_model=base_model,
                teacher=teacher,
                origin=str(recipe),
                progress=make_progress(quiet=quiet),
                mesh=mesh,
            )
            if mesh.is_main_process:
                run.write_recipe(text)
            outcome = trainer.run()
    if mesh.is_main_process and outcome.model is not None:
        print(f"{outcome.model}: trained for {outcome.step} steps; lowlat chat {outcome.model}")
    if outcome.model is None:
        if mesh.is_main_process:
            print(f"{folder}: stopped after {outcome.step} steps", file=sys.stderr)
        raise typer.Exit(130)


def _log(parsed: "Recipe", run: "RunFolder", quiet: bool) -> "MetricsLog":
    """The metrics log of the process that locks the run folder; a silent one for the others."""
    from lowlat.train.metrics.live_view import make_view
    from lowlat.train.metrics.metrics_log import FolderMetricsLog, SilentMetricsLog

    if not run.held:
        return SilentMetricsLog()
    return FolderMetricsLog(
        run, view=make_view(quiet=quiet), tensorboard_wanted=parsed.log.tensorboard
    )


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Run folder, finished or still training; several are compared."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Plot file: .png, .svg or .pdf; a name without a suffix gives a .png and an .svg. "
            "The figures are written next to it as .json. By default a single run gets report.png, "
            "report.svg and report.json in its folder.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Final and best losses, speed and expert balance, with plots of the whole run.

    Losses are in nats per token. MFU is relative to the rate of matrix products measured on this
    machine. MaxVio is the maximum load of an expert over the mean load, minus 1.
    """
    from rich.console import Console

    from lowlat.train.metrics.lines import plain
    from lowlat.train.metrics.plot import available, draw
    from lowlat.train.metrics.summary import summarise
    from lowlat.train.metrics.training_report import (
        pictures,
        read_runs,
        table,
        write_json,
        write_report,
    )

    files = [] if out is None else pictures(out)
    histories = read_runs(runs)
    summaries = {label: summarise(history) for label, history in histories.items()}
    if as_json:
        print(json.dumps(plain(summaries), allow_nan=False, indent=2))
    else:
        Console().print(table(summaries))
    if files:
        draw(histories, files)
        files.append(write_json(summaries, files[0].with_suffix(".json")))
    elif len(runs) > 1:
        _print_note("no plot of several runs without --out FILE")
    elif not available():
        _print_note("no plot: matplotlib is not installed (pip install lowlat[train])")
    else:
        files = write_report(*histories.values())
    if files:
        _print_note(f"wrote {', '.join(map(str, files))}")


def _print_note(text: str) -> None:
    """Print to stderr: stdout has only the table or the JSON."""
    print(text, file=sys.stderr)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; it must not exist.")],
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint, by default the latest.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Data type to store: bf16, fp16, fp32 or fp8.")
    ] = "bf16",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the LoRA adapter, in peft's layout.")
    ] = False,
) -> None:
    """Export a checkpoint as a Hugging Face folder, which lowlat chat and other programs load."""
    from lowlat.train.run.export import export_adapter, export_save
    from lowlat.utils.progress import make_progress

    progress = make_progress()
    if adapter:
        done = export_adapter(run, dst, step=step, progress=progress)
        print(f"{dst}: the adapter after {done} steps")
        return
    done = export_save(run, dst, step=step, dtype=dtype, progress=progress)
    print(f"{dst}: the model after {done} steps in {dtype}")


app = with_subverbs(
    train,
    {"report": report, "export": export},
    epilog="lowlat train report RUN summarizes a run; lowlat train export RUN DST exports one of "
    "its checkpoints as a model.",
)
