"""Inputs of verbs: models, text files, standard input. Errors are one line with a remedy."""

import sys
from pathlib import Path
from typing import Unpack

from lowlat import api
from lowlat.generate.model import Model
from lowlat.ops import native
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, make_progress


def load_model(name: str, *, threads: int | None, **loading: Unpack[api.LoadOptions]) -> Model:
    """The model `name`, downloaded and converted if necessary, with progress on stderr.

    Sets the threads of PyTorch and of the native kernels if `threads` is given.
    """
    if threads is not None:
        native.use_threads(threads)
    loading.setdefault("progress", make_progress())
    return api.load(name, **loading)


def recipe_checkpoint(recipe: Path, key: str, name: str | None, progress: Progress) -> Path | None:
    """Files of the checkpoint `name`, the value of `key` in a recipe file; None if it has none.

    A name is a path relative to the recipe, else relative to the working directory, else a preset
    or hub id. Raises UserError naming recipe and key.
    """
    if name is None:
        return None
    relative = recipe.parent / name
    try:
        return api.prepare(str(relative) if relative.exists() else name, progress=progress)
    except UserError as error:
        raise UserError(f"{recipe}: {key}: {error}") from error


def read_stdin() -> str:
    """All of standard input, without the last newline."""
    return _decode(sys.stdin.buffer.read(), "standard input").removesuffix("\n").removesuffix("\r")


def read_text_file(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return _decode(path.read_bytes(), f"'{path}'")
    except OSError as error:
        raise UserError(
            f"cannot read '{path}': {error.strerror}; give the path of a text file"
        ) from error


def _decode(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{origin} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from error
