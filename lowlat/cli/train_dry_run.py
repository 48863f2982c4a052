"""`lowlat train RECIPE --dry-run`: what a recipe takes on this machine. Owns the output only."""

from pathlib import Path

from lowlat.cli.plan_view import show_dry_run
from lowlat.train.build import DTYPES
from lowlat.train.plan.dryrun import dry_run, recipe_config, usable_memory
from lowlat.train.plan.rate import measure_gemm_rate
from lowlat.train.recipe import Recipe
from lowlat.train.teacher import teacher_config
from lowlat.train.teacher_check import check_teacher
from lowlat.utils.device import parse_device


def print_dry_run(
    recipe: Recipe, path: Path, start: Path | None, teacher: Path | None = None
) -> None:
    """Measure the rate of products and print the figures of `recipe`, which was read from `path`;
    start, teacher: the files behind recipe.start and recipe.distillation.
    """
    device = parse_device(recipe.device)
    rate = measure_gemm_rate(DTYPES[recipe.precision], device)
    config = recipe_config(recipe, path, start)
    taught = None
    if teacher is not None:
        check_teacher(config, teacher, recipe, str(path))
        taught = teacher_config(teacher)
    memory = usable_memory(device, recipe.parallel.processes)
    found = dry_run(config, recipe, rate=rate, memory_bytes=memory, teacher=taught)
    show_dry_run(recipe.name, found)
