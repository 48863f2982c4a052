"""Bits per byte out of nats per target: how many targets a byte of the held-out text has."""

from pathlib import Path
from typing import Any

import pytest

from lowlat.train.inputs.phase_data import PhaseData, phase_data
from lowlat.train.run.step_records import eval_record
from tests.unit.data.conftest import Make, make_folder, texts

from . import runs

__all__ = ["make_folder"]

BEGIN = 257


def data(make_folder: Make, tmp_path: Path, *, masks: bool, **options: Any) -> PhaseData:
    documents = texts(40)
    folder = make_folder(documents, held_out=documents[:20], **options)
    recipe = runs.recipe(data={"folder": "tokens", "document_masks": masks})
    return phase_data(recipe, 0, folder, 1)


def bits(data: PhaseData) -> float | None:
    """Of a loss of ln 2, a bit per target."""
    return eval_record((0.6931471805599453,), 1, 3, 5, data).bits_per_byte


def test_targets_of_masked_documents_are_counted(make_folder: Make, tmp_path: Path) -> None:
    """Regression: bits per byte too high by the first token of every document, which nobody
    predicts where documents are blind to each other.
    """
    found = data(make_folder, tmp_path, masks=True, head=[BEGIN])
    tokens, size = found.dataset.num_tokens("held_out"), found.dataset.num_bytes("held_out")
    documents = found.dataset.num_documents("held_out")
    assert documents == 20
    assert bits(found) == pytest.approx((tokens - documents) / size)


def test_every_token_of_joined_documents_is_a_target(make_folder: Make, tmp_path: Path) -> None:
    found = data(make_folder, tmp_path, masks=False, head=[BEGIN])
    tokens, size = found.dataset.num_tokens("held_out"), found.dataset.num_bytes("held_out")
    assert bits(found) == pytest.approx(tokens / size)


def test_text_without_predictions_makes_bits_unknown(make_folder: Make, tmp_path: Path) -> None:
    """Without a token that begins documents, their first text is given."""
    assert bits(data(make_folder, tmp_path, masks=True)) is None
