"""`lowlat train RECIPE --dry-run`: print memory, FLOPs and time of a recipe on this machine."""

import json
import sys
from pathlib import Path
from typing import Any

from lowlat.cli.plan_view import show_dry_run
from lowlat.config.model import ModelConfig
from lowlat.plan.rate import measure_gemm_rate
from lowlat.train.cost.dry_run import (
    DryRun,
    dry_run,
    needed_bytes,
    require_fit,
    usable_memory,
)
from lowlat.train.inputs.configs import check_recipe, recipe_config
from lowlat.train.inputs.model_files import teacher_config
from lowlat.train.inputs.run_inputs import open_phases
from lowlat.train.recipe.schedule import data_of
from lowlat.train.recipe.schema import Recipe
from lowlat.train.run.build import DTYPES
from lowlat.utils.device import parse_device


def print_dry_run(
    recipe: Recipe,
    path: Path,
    base_model: Path | None,
    teacher: Path | None = None,
    *,
    as_json: bool = False,
) -> None:
    """Measure the GEMM rate and print the estimates of `recipe`, which was read from `path`.

    base_model, teacher: files of recipe.base_model and recipe.distillation. Raises UserError if a
    run would; if memory is too small, after printing.
    """
    device = parse_device(recipe.device)
    config = _config(recipe, path, base_model, teacher)
    taught = None if teacher is None else teacher_config(teacher)
    rate = measure_gemm_rate(DTYPES[recipe.precision], device)
    memory = usable_memory(device, recipe.parallel.processes)
    found = dry_run(config, recipe, rate=rate, memory_bytes=memory, teacher=taught)
    if as_json:
        print(json.dumps({"name": recipe.name} | dry_run_object(found), indent=2))
    else:
        show_dry_run(recipe.name, found)
    require_fit(config, recipe, memory_bytes=memory, teacher=taught, origin=str(path))


def dry_run_object(found: DryRun) -> dict[str, Any]:
    """The object of --json, in bytes, seconds and FLOPs."""
    least, most = found.seconds
    return {
        "parameters": found.parameters,
        "steps": found.steps,
        "tokens": found.tokens,
        "flops": found.total_flops,
        "flops_per_second": found.rate,
        "seconds": {"least": least, "most": most},
        "memory": {
            "total": needed_bytes(found.memory),
            "by_purpose": found.memory.parts,
            "largest": found.memory.largest,
            "available": found.memory_bytes,
        },
    }


def _config(
    recipe: Recipe, path: Path, base_model: Path | None, teacher: Path | None
) -> ModelConfig:
    """Model config of the first phase, after the checks of a run; data is checked if present."""
    tables = [data_of(recipe, index) for index in range(len(recipe.phase))]
    folders = [path.parent / table.folder for table in tables if table is not None]
    absent = [folder for folder in folders if not folder.exists()]
    if not absent:
        return open_phases(recipe, base_model, path.parent, str(path), teacher)[0][0]
    config = check_recipe(recipe_config(recipe, path, base_model), recipe, str(path), teacher)[0]
    print(f"{absent[0]}: does not exist yet; the data was not checked", file=sys.stderr)
    return config
