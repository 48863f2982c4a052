"""`lowlat train`: train a model from a recipe, or resume from the last checkpoint.

Parses arguments and prints; the trainer is `lowlat.train`.
"""

import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowlat.cli.subverbs import with_subverbs
from lowlat.cli.train_export import export
from lowlat.cli.train_report import report

if TYPE_CHECKING:
    from lowlat.train.checkpoints.run_folder import RunFolder
    from lowlat.train.metrics.metrics_log import MetricsLog
    from lowlat.train.recipe.schema import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe in TOML.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Run folder, by default runs/NAME.", show_default=False
        ),
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
    from lowlat.cli.train_inputs import base_model_files, teacher_files
    from lowlat.train.recipe.schema import read_recipe
    from lowlat.train.recipe.toml import text_of
    from lowlat.utils.progress import make_progress

    parsed = read_recipe(recipe, changes or [])
    progress = make_progress(quiet=quiet)
    _check_device(parsed, recipe)
    base_model = base_model_files(parsed, recipe, progress)
    teacher = teacher_files(parsed, recipe, progress)
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


app = with_subverbs(
    train,
    {"report": report, "export": export},
    epilog="lowlat train report RUN summarizes a run; lowlat train export RUN DST exports one of "
    "its checkpoints as a model.",
)
