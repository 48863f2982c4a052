"""Resolve the checkpoints that a recipe names (`base_model`, `distillation.teacher`) to files.

Names are resolved by `lowlat.api`.
"""

from pathlib import Path

from lowlat import api
from lowlat.train.recipe.schema import Recipe
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress


def base_model_files(recipe: Recipe, path: Path, progress: Progress) -> Path | None:
    """Files of `recipe.base_model`, or None; `path` is the recipe's file. Raises UserError."""
    return (
        None
        if recipe.base_model is None
        else _files("base_model", recipe.base_model, path, progress)
    )


def teacher_files(recipe: Recipe, path: Path, progress: Progress) -> Path | None:
    """Files of `recipe.distillation.teacher`, or None; `path` is the recipe's file. Raises
    UserError.
    """
    table = recipe.distillation
    if table is None:
        return None
    return _files("distillation.teacher", table.teacher, path, progress)


def _files(key: str, name: str, path: Path, progress: Progress) -> Path:
    """`name` as a path relative to the recipe `path`, else relative to the working directory, else
    as a preset or hub id.
    """
    relative = path.parent / name
    try:
        return api.prepare(str(relative) if relative.exists() else name, progress=progress)
    except UserError as error:
        raise UserError(f"{path}: {key}: {error}") from error
