"""The batch of a failed step as a file, whole again when read, and files that are none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowlat.train.run.failed_step import batch_file, keep_batch, read_batch
from lowlat.utils.errors import UserError

from . import tiny


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_comes_back(tmp_path: Path, masked: bool) -> None:
    path = batch_file(tmp_path, 6)
    assert path.name == "failed-step-00000007.safetensors"
    batch = tiny.batch(masked=masked)
    keep_batch(path, 6, tiny.batch())
    keep_batch(path, 6, batch)
    found = read_batch(path)
    assert torch.equal(found.tokens, batch.tokens)
    assert torch.equal(found.loss_mask, batch.loss_mask)
    assert found.documents == batch.documents


def test_files_that_are_no_batch(tmp_path: Path) -> None:
    """One line that names the file, whatever is in it.

    Regression: files without metadata, or with other metadata, that end in a traceback.
    """
    missing, text, bare, other, wrong = (
        tmp_path / name for name in ("missing", "text", "bare", "other", "wrong")
    )
    text.write_text("no tensors")
    tensors = {"tokens": torch.zeros(1, 2, dtype=torch.int64), "loss_mask": torch.ones(1, 2)}
    save_file(tensors, bare)
    save_file({"tokens": torch.zeros(1, 2)}, other, metadata={"documents": "null"})
    save_file(tensors, wrong, metadata={"documents": "{"})
    for path in (missing, text, bare, other, wrong):
        with pytest.raises(UserError, match=f"{path}: is not the batch file of a failed step"):
            read_batch(path)


def test_a_batch_that_cannot_be_kept_says_so(tmp_path: Path) -> None:
    """Regression: a full disk that hides why a run stopped."""
    path = batch_file(tmp_path / "gone", 6)
    assert keep_batch(path, 6, tiny.batch()).startswith("not saved (")
    kept = batch_file(tmp_path, 6)
    assert keep_batch(kept, 6, tiny.batch()) == f"in {kept}"
    assert [file.name for file in tmp_path.iterdir()] == [kept.name]
