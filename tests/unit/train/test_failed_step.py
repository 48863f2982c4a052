"""A step that failed: looked at again, and how to resume."""

import math
from pathlib import Path

import pytest
import torch

from lowlat.checkpoint.save import save_model
from lowlat.config.hf.reader import config_from_hf
from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer
from lowlat.train.run.export import export_save
from lowlat.train.run.failed_step import diagnose_failed_step
from lowlat.utils.errors import UserError

from . import runs
from .runs import opened, train
from .test_trainer import BOOM


def test_a_failed_run_resumes_as_its_message_says(base: Path) -> None:
    """By export and a new recipe with a lower rate."""
    run = base / "run"
    with (
        opened(run, runs.recipe(phase=runs.phases(BOOM, {}))) as trainer,
        pytest.raises(UserError, match="not finite"),
    ):
        trainer.run()
    with pytest.raises(UserError, match="has no failed step"):
        diagnose_failed_step(base)
    good = base / "good"
    export_save(run, good, step=2, dtype="fp32")
    wanted = runs.recipe(model=None, base_model="good", phase=runs.PHASES[1:])
    outcome, _ = train(base / "on", wanted, base_model=good)
    assert outcome.is_complete and all(map(math.isfinite, outcome.losses))


def test_the_sequence_wise_loss_breaks_a_step_again(base: Path) -> None:
    run = base / "run"
    with (
        opened(run, runs.recipe(balance={"sequence_weight": 1e38})) as trainer,
        pytest.raises(UserError, match="not finite"),
    ):
        trainer.run()
    found = diagnose_failed_step(run)
    assert found.sequence_loss > 1e30 and found.matched is None
    assert all(map(math.isfinite, found.losses)) and not math.isfinite(found.grad_norm)


def test_a_start_without_numbers_is_named(base: Path) -> None:
    """Regression: a lower rate advised where none would help."""
    broken = build_start(base / "base_model")
    wanted = runs.recipe(model=None, base_model="base_model", phase=runs.PHASES[1:])
    with pytest.raises(
        UserError, match=r"base_model .*'norm\.weight' has values that are not finite"
    ):
        train(base / "run", wanted, base_model=broken)


def build_start(folder: Path) -> Path:
    """A model of the recipe's kind, of which one number is none."""
    config = config_from_hf({"vocab_size": 270, **runs.MODEL}, source="test")
    model = Transformer(config)
    init_weights(model, seed=1)
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    save_model(model, config, folder, source=None)
    return folder
