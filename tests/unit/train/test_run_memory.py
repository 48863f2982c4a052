"""Copies of the state in a run: one at a time for saves, none from phase to phase."""

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

import lowlat.train.run.trainer as trainer_module
from lowlat.train.checkpoints import writer
from lowlat.train.checkpoints.store import CheckpointStore

from . import runs
from .runs import train


def test_one_copy_of_the_state_at_a_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save before is on the disk, its copy gone, when the next copy is made.

    Regression: twice the memory of a save where saves follow fast on one another.
    """
    written: list[int] = []
    copied: list[int] = []
    asked = threading.Event()

    def write(*arguments: Any) -> None:
        asked.wait(60)  # slower than any step
        plain_write(*arguments)
        written.append(arguments[1])

    def wait(self: CheckpointStore) -> None:
        if self._pending is not None and not self._pending.done():
            asked.set()
        plain_wait(self)

    def copy(*arguments: Any, **options: Any) -> Any:
        copied.append(len(written))
        return plain_copy(*arguments, **options)

    plain_write, plain_copy, plain_wait = (
        writer.write_training_checkpoint,
        trainer_module.snapshot,
        CheckpointStore.wait,
    )
    monkeypatch.setattr(CheckpointStore, "wait", wait)
    monkeypatch.setattr(writer, "write_training_checkpoint", write)
    monkeypatch.setattr(trainer_module, "snapshot", copy)
    train(base / "run", runs.recipe(checkpoints={"every_steps": 1}), 4)
    assert copied == [0, 1, 2, 3]


def test_a_change_of_phase_moves_the_state(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model and the optimiser of the phase before are gone when those of the next are made.

    Regression: weights and moments of both phases at once.
    """
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def keep(name: str) -> None:
        plain = getattr(trainer_module, name)

        def make(*arguments: Any) -> Any:
            alive.append(sum(one() is not None for one in made))
            result = plain(*arguments)
            made.append(weakref.ref(result))
            return result

        monkeypatch.setattr(trainer_module, name, make)

    keep("new_model")
    keep("Optimizer")
    train(base / "run", runs.recipe())
    assert alive == [0, 1, 0, 1]
