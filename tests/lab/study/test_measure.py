"""Drafts judged against the main model and the text."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lowlat_lab.study.measure import drafts, standard_error

from lowlat import api
from tests.unit.data.conftest import Make


def one_hot(ids: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(ids), 300).float()


def test_drafts_are_compared_with_what_the_main_model_decides(
    make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: rows shifted by one, which would compare a draft with another place's token."""
    text = [10, 11, 12, 13, 14]
    data = make_folder([text], held_out=[text])
    main = [11, 12, 99, 14, 15]  # after each token; right but for the third
    draft = [12, 99, 14, 55]  # row i proposes token i + 2
    fake = SimpleNamespace(
        config=SimpleNamespace(num_nextn_predict_layers=1),
        logits=lambda ids: one_hot(main),
        mtp_logits=lambda ids: [one_hot(draft)],
    )
    monkeypatch.setattr(api, "load", lambda *_names, **_options: fake)
    found = drafts(Path("model"), data, length=5, windows=3)
    assert found.acceptance == (1.0,)
    assert found.draft_hits == found.main_hits == (pytest.approx(2 / 3),)


def test_without_modules_there_are_no_drafts(
    make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(config=SimpleNamespace(num_nextn_predict_layers=0))
    monkeypatch.setattr(api, "load", lambda *_names, **_options: fake)
    data = make_folder([[1, 2, 3]], held_out=[[1, 2, 3]])
    assert drafts(Path("model"), data, length=2, windows=3).acceptance == ()


def test_standard_error() -> None:
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(3**-0.5)
    assert standard_error([1.0]) is None
