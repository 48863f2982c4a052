"""Which rows a phase reads: on in those of the phase before, or in an order of its own."""

from pathlib import Path

import pytest
import torch

from lowlat.data.batch import Batch
from lowlat.data.packing import PackedSequences
from tests.parameters import slow_except

from . import runs
from .runs import opened, train


@pytest.mark.parametrize("last", slow_except([None, 1], [None, 1, 2, 3]))
def test_a_phase_continues_in_the_same_data(
    base: Path, last: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two phases of half an epoch read every row once, stopped or not.

    Regression: a second phase in another order, which reads some documents twice and others never.
    """
    with opened(base / "look", runs.recipe()) as trainer:
        windows = trainer._present.train
    rows = windows.per_epoch // 4
    assert rows > 1
    expected = windows.batch(0, 4 * rows).tokens
    each = {"name": "a", "steps": 2, "sequence_length": 11, "batch_size": rows}
    each |= {"micro_batch_size": rows, "learning_rate": 1e-3}
    wanted = runs.recipe(phase=[each, each | {"name": "b"}])
    read: list[torch.Tensor] = []

    def batch(self: PackedSequences, first: int, count: int) -> Batch:
        found = plain(self, first, count)
        if (
            self._split == "train" and count == rows
        ):  # single ones are looked at before the base_model
            read.append(found.tokens)
        return found

    plain = PackedSequences.batch
    monkeypatch.setattr(PackedSequences, "batch", batch)
    if last is not None:
        train(base / "run", wanted, last)
    outcome, _ = train(base / "run", wanted)
    assert outcome.is_complete and torch.equal(torch.cat(read), expected)


def test_data_that_restarts_has_an_order_of_its_own(base: Path) -> None:
    """Not that in which a run of the next seed begins."""
    other = {"data": {"folder": "tokens"}, "sequence_length": 11}
    wanted = runs.recipe(data={"folder": "tokens"}, phase=[*runs.PHASES, runs.PHASES[1] | other])
    with opened(base / "run", wanted) as trainer:
        orders = [batches_of(data.train) for data in trainer._inputs.data]
    for seed in (4, 5):
        with opened(base / f"run-{seed}", runs.recipe(data={"folder": "tokens"}, seed=seed)) as run:
            assert batches_of(run._inputs.data[0].train) not in orders
    assert orders[0] != orders[2]


def batches_of(windows: PackedSequences) -> list[list[int]]:
    return windows.batch(0, 5).tokens.tolist()
