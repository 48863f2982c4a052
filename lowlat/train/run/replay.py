"""File format for the batch of a failed step, so that `failed_step` can recompute it."""

import json
from pathlib import Path

import torch

from lowlat.checkpoint.safetensors.reader import SafetensorsFile
from lowlat.checkpoint.safetensors.writer import file_pieces
from lowlat.data.batch import Batch
from lowlat.utils.errors import UserError

BATCH_FILES = "failed-step-*.safetensors"
"""Pattern of batch files in a run folder."""


def batch_file(folder: Path, step: int) -> Path:
    """Path of the batch of `step` (from 0) in a run folder."""
    return folder / f"failed-step-{step + 1:08}.safetensors"


def step_of(path: Path) -> int:
    """The step (from 0) in the name of a batch file."""
    return int(path.stem.rpartition("-")[2]) - 1


def keep_batch(path: Path, step: int, batch: Batch) -> str:
    """Write `batch` of `step` (from 0) to `path`, replacing an existing file.

    Returns the path, or the reason why writing failed, as a phrase for the error of the step: a
    write error must not hide the step's error.
    """
    metadata = {"documents": json.dumps(batch.documents), "step": str(step)}
    tensors = [("tokens", batch.tokens), ("loss_mask", batch.loss_mask)]
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(file_pieces(tensors, metadata))
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        return f"not saved ({error})"
    return f"in {path}"


def read_batch(path: Path) -> Batch:
    """Read a file of `keep_batch`. Raises UserError."""
    try:
        file = SafetensorsFile(path)
        tokens, loss_mask = file.read("tokens"), file.read("loss_mask")
        documents = json.loads(file.metadata["documents"])
    except (UserError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not the batch file of a failed step ({error})") from error
    rows = None if documents is None else tuple(tuple(row) for row in documents)
    return Batch(tokens=tokens, loss_mask=loss_mask.to(torch.bool), documents=rows)
