"""Inputs of verbs: models, text files, standard input. Errors are one line with a remedy."""

import sys
from pathlib import Path
from typing import Unpack

from lowlat import api
from lowlat.generate.model import Model
from lowlat.ops import native
from lowlat.text.plain import MAX_TEXT_BYTES
from lowlat.utils.bounded_read import read_bounded, read_stream
from lowlat.utils.errors import UserError
from lowlat.utils.numa import bind_process
from lowlat.utils.process_group import (
    is_follower,
    local_processes,
    quiet_followers,
    refuse_alone,
    started_processes,
)
from lowlat.utils.progress import Progress, make_progress

MAX_PROMPT_BYTES = 64 * 2**20
"""Most bytes of a prompt from standard input, ten times what the longest contexts hold."""


def load_model(name: str, *, threads: int | None, **loading: Unpack[api.LoadOptions]) -> Model:
    """The model `name`, downloaded and converted if necessary, with progress on stderr.

    Sets the threads of PyTorch and of the native kernels if `threads` is given. Raises UserError
    for a model without a tokenizer: all verbs that load one here use text.
    """
    threads = process_threads(loading.get("parallel"), threads)
    if threads is not None:
        native.use_threads(threads)
    loading.setdefault("progress", process_progress())
    model = api.load(name, **loading)
    model.tokenizer.require()
    return model


def process_progress() -> Progress:
    """Progress of process 0; the other processes of torchrun show none."""
    return make_progress(quiet=is_follower())


def process_threads(parallel: str | None, threads: int | None) -> int | None:
    """--threads of this process; with --parallel it is bound to its NUMA node, and has by default
    one thread per core, at most the processors divided by the processes. Raises UserError for
    processes of torchrun without --parallel.
    """
    if parallel is not None:
        # torchrun sets OMP_NUM_THREADS to 1 unless it is set
        most = max(1, native.processors() // local_processes())
        cores = bind_process(threads)
        return threads or min(most, cores or most)
    if started_processes() > 1:
        with quiet_followers():
            refuse_alone()
    return threads


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
    """All of standard input, without the last newline. Raises UserError for endless input."""
    if is_follower():
        return ""  # process 0 has the input
    data = read_stream(sys.stdin.buffer.read, MAX_PROMPT_BYTES, "standard input")
    return _decode(data, "standard input").removesuffix("\n").removesuffix("\r")


def read_text_file(path: Path) -> str:
    """The text of a UTF-8 file. Raises UserError for devices and files beyond MAX_TEXT_BYTES."""
    try:
        return _decode(read_bounded(path, MAX_TEXT_BYTES, f"'{path}'"), f"'{path}'")
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
