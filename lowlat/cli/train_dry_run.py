"""`lowlat train RECIPE --dry-run`: what a recipe takes on this machine. Owns the output only."""

from pathlib import Path

from lowlat.cli.plan_view import show_dry_run
from lowlat.train.build import DTYPES
from lowlat.train.plan.dryrun import dry_run, recipe_config, usable_memory
from lowlat.train.plan.rate import measure_gemm_rate
from lowlat.train.recipe import Recipe
from lowlat.utils.device import parse_device


def print_dry_run(recipe: Recipe, path: Path, start: Path | None) -> None:
    """Measure the rate of products and print the figures of `recipe`, which was read from `path`;
    start: the files behind recipe.start.
    """
    device = parse_device(recipe.device)
    rate = measure_gemm_rate(DTYPES[recipe.precision], device)
    config = recipe_config(recipe, path, start)
    found = dry_run(
        config, recipe, rate=rate, memory_bytes=usable_memory(device, recipe.parallel.processes)
    )
    show_dry_run(recipe.name, found)
