"""The batch of a step that failed, kept as a file and read back, so that the step can be looked at
again.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lowlat.data.batch import Batch
from lowlat.utils.errors import UserError

BATCH_FILES = "failed-step-*.safetensors"
"""Batches in the folder of a run."""


def batch_file(folder: Path, step: int) -> Path:
    """Where the batch of `step` (from 0) is kept in the folder of a run."""
    return folder / f"failed-step-{step + 1:08}.safetensors"


def step_of(path: Path) -> int:
    """The step (from 0) whose batch `batch_file` keeps as `path`."""
    return int(path.stem.rpartition("-")[2]) - 1


def keep_batch(path: Path, step: int, batch: Batch) -> str:
    """Write `batch` of `step` (from 0) as `path`, in place of one that is there; says where it is,
    or why it is nowhere: that it failed must not hide the failure of the step.
    """
    documents = json.dumps(batch.documents)
    tensors = {"tokens": batch.tokens.cpu(), "loss_mask": batch.loss_mask.cpu()}
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"documents": documents, "step": str(step)})
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        return f"not kept ({error})"
    return f"in {path}"


def read_batch(path: Path) -> Batch:
    """The batch in a file of `keep_batch`. Raises UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            tokens, loss_mask = file.get_tensor("tokens"), file.get_tensor("loss_mask")
            documents = json.loads((file.metadata() or {})["documents"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not a batch that a failed step left ({error})") from error
    rows = None if documents is None else tuple(tuple(row) for row in documents)
    return Batch(tokens=tokens, loss_mask=loss_mask.to(torch.bool), documents=rows)
