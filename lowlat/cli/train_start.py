"""The files behind a recipe's `start`. Owns where names are looked for; what names there are is
`api`'s.
"""

from pathlib import Path

from lowlat import api
from lowlat.train.recipe import Recipe
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress


def start_files(recipe: Recipe, path: Path, progress: Progress) -> Path | None:
    """The checkpoint that `recipe`, read from `path`, goes on from: one that lies there counted
    from the recipe, as its data does, or from here, or else a name; None where there is none.
    Raises UserError.
    """
    if recipe.start is None:
        return None
    beside = path.parent / recipe.start
    try:
        return api.prepare(str(beside) if beside.exists() else recipe.start, progress=progress)
    except UserError as error:
        raise UserError(f"{path}: start: {error}") from error
