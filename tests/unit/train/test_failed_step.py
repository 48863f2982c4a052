"""A step that failed: looked at again, and how to go on."""

import math
from pathlib import Path

import pytest

from lowlat.train.export import export_save
from lowlat.train.failed_step import look_again
from lowlat.utils.errors import UserError

from . import runs
from .runs import opened, train
from .test_trainer import BOOM


def test_a_failed_run_goes_on_as_its_message_says(base: Path) -> None:
    """By export and a new recipe with a lower rate."""
    run = base / "run"
    with (
        opened(run, runs.recipe(phase=runs.phases(BOOM, {}))) as trainer,
        pytest.raises(UserError, match="not finite"),
    ):
        trainer.run()
    with pytest.raises(UserError, match="no step of it failed"):
        look_again(base)
    good = base / "good"
    export_save(run, good, step=2, dtype="fp32")
    wanted = runs.recipe(model=None, start="good", phase=runs.PHASES[1:])
    outcome, _ = train(base / "on", wanted, start=good)
    assert outcome.is_complete and all(map(math.isfinite, outcome.losses))
