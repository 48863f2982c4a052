"""Recall and copying: what can be known, documents in a dataset, accuracy of a model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lowlat_lab.study import tasks as module
from lowlat_lab.study.attention import study
from lowlat_lab.study.plan import StudyPlan
from lowlat_lab.study.tasks import TaskTokens, add_tasks, has_tasks

from lowlat.data.dataset import TokenizedDataset
from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress

MakePlan = Callable[..., StudyPlan]


@pytest.fixture
def tokens(data: TokenizedDataset, monkeypatch: pytest.MonkeyPatch) -> TaskTokens:
    """Of a vocabulary of bytes."""
    monkeypatch.setattr(module, "KEYS", 97)
    monkeypatch.setattr(module, "LENGTHS", (2, 7))
    monkeypatch.setattr(module, "MEASURED", (3, 5))
    return TaskTokens.of(data)


def test_answers_of_recall_are_in_the_first_list(tokens: TaskTokens) -> None:
    task = tokens.recall(11, np.random.default_rng(3))
    assert len(task.ids) == 2 + 4 * 11 and len(task.answers) == 11
    first = task.ids[1:23].reshape(11, 2)
    table = dict(first.tolist())
    assert len(table) == 11
    assert all(table[task.ids[place - 1]] == task.ids[place] for place in task.answers)
    assert [*task.ids[task.answers - 1]] != [*first[:, 0]]  # in another order


def test_answers_of_copying_repeat_the_string(tokens: TaskTokens) -> None:
    task = tokens.copying(7, np.random.default_rng(3))
    assert len(task.ids) == 2 + 2 * 14
    assert task.ids[task.answers].tolist() == task.ids[1:15].tolist()


def test_tasks_are_a_share_of_the_training_tokens(
    data: TokenizedDataset, tokens: TaskTokens, tmp_path: Path
) -> None:
    written = add_tasks(data, tmp_path / "tasks", share=0.3, progress=SilentProgress())
    written.verify()
    assert has_tasks(written) and not has_tasks(data)
    share = 1 - data.num_tokens("train") / written.num_tokens("train")
    assert 0.3 <= share < 0.33
    places = np.arange(data.num_tokens("held_out"))
    assert written.num_tokens("held_out") == len(places)
    assert (written.tokens("held_out", places) == data.tokens("held_out", places)).all()
    again = add_tasks(data, tmp_path / "again", share=0.3, progress=SilentProgress())
    assert again.fingerprint == written.fingerprint
    for share, source in ((1.0, data), (0.0, data)):
        with pytest.raises(UserError, match="--share"):
            add_tasks(source, tmp_path / "none", share=share, progress=SilentProgress())


def test_a_vocabulary_that_is_too_small(data: TokenizedDataset) -> None:
    with pytest.raises(UserError, match="plain tokens, tasks need 515"):
        TaskTokens.of(data)


@pytest.mark.slow
def test_accuracy_is_in_the_report(
    make_plan: MakePlan, data: TokenizedDataset, tokens: TaskTokens, tmp_path: Path
) -> None:
    mixed = add_tasks(data, tmp_path / "tasks", share=0.2, progress=SilentProgress())
    plan = make_plan(data=mixed.path, steps=2, measures_speed=False)
    report = study(plan, mixed, tmp_path / "out", SilentProgress(), "lowlat-lab study attention")
    assert report["failures"] == []
    for variant in report["variants"]:
        for task in ("recall", "copying"):
            figure = variant[task]
            assert figure["count"] == 2 and [*figure["by_length"]] == ["3", "5"]
            assert 0 <= figure["mean"] <= 1
