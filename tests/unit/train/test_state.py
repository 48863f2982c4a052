"""What a state consists of, and when a run may resume from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.train.recipe.schedule import TrainingSchedule
from lowlat.train.recipe.schema import OptimizerConfig
from lowlat.train.run.state import (
    MODEL,
    OPTIMIZER,
    RANDOM,
    Position,
    check_config,
    check_resumable,
    facts,
    part,
    snapshot,
    state_tensors,
)
from lowlat.train.step.optim import Optimizer
from lowlat.utils.errors import UserError

from . import runs, tiny
from .test_optim import set_gradients


def test_every_tensor_of_a_state() -> None:
    """Weights, routing biases, moments of every trained parameter, random numbers."""
    model = tiny.model(tiny.config())
    optimizer = Optimizer(model, OptimizerConfig(), tiny.unsharded(model))
    set_gradients(model, 1)
    optimizer.step(0.1)
    state = dict(state_tensors(tiny.unsharded(model), optimizer))
    names = [name for name, _ in model.named_parameters()]
    assert list(part(state, MODEL)) == names
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    kept = part(state, OPTIMIZER)
    assert kept.keys() == {
        f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in trained
    }
    assert sum("e_score_correction_bias" in name for name in names) == 3
    assert torch.equal(state[RANDOM], torch.get_rng_state())
    assert len(state) == len(names) + 3 * len(trained) + 1


def test_a_snapshot_does_not_change() -> None:
    """Training continues while it is written."""
    model = tiny.model(tiny.config())
    optimizer = Optimizer(model, OptimizerConfig(), tiny.unsharded(model))
    set_gradients(model, 1)
    optimizer.step(0.1)
    taken = snapshot(tiny.unsharded(model), optimizer)
    before = {name: tensor.clone() for name, tensor in taken}
    set_gradients(model, 2)
    optimizer.step(0.1)
    torch.rand(3)
    assert all(torch.equal(before[name], tensor) for name, tensor in taken)
    after = dict(state_tensors(tiny.unsharded(model), optimizer))
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    assert snapshot(tiny.unsharded(model), optimizer, keep=False) == []


def resume(saved: dict[str, Any], **changes: Any) -> Position:
    recipe = runs.recipe(**changes)
    return check_resumable(saved, recipe, tiny.inputs("a", "b"), TrainingSchedule(recipe), "runs/x")


def saved(step: int) -> dict[str, Any]:
    recipe = runs.recipe()
    position = Position(step=step, seconds=2.5)
    return facts(recipe, tiny.config(), position, tiny.inputs("a", "b"), TrainingSchedule(recipe))


@pytest.mark.parametrize(
    ("step", "phase", "rows"), [(0, 0, 0), (3, 0, 10), (4, 0, 16), (5, 1, 0), (6, 1, 4), (9, 1, 16)]
)
def test_where_a_run_stands(step: int, phase: int, rows: int) -> None:
    """In its recipe, in the data of its phase, and in tokens of all phases."""
    found = saved(step)
    assert (found["step"], found["phase"], found["rows_of_data"]) == (step, phase, rows)
    tokens = [0, 22, 66, 110, 176, 242, 310, 378, 446, 514]
    assert found["tokens"] == tokens[step]
    assert resume(found) == Position(step=step, seconds=2.5)


def test_what_differs_is_said() -> None:
    with pytest.raises(UserError) as caught:
        resume(saved(3), seed=4, balance={"sequence_weight": 0.1})
    message = str(caught.value)
    assert "balance.sequence_weight was 0.0001 and is 0.1; seed was 3 and is 4" in message
    assert message.startswith("runs/x: was trained with another recipe: ")
    other = saved(3) | {"data": ["a", "c"]}
    with pytest.raises(UserError, match="its data, prompts or reward files have changed"):
        resume(other)
    with pytest.raises(UserError, match="batches rounded"):
        resume(saved(3) | {"tokens": 111})


@pytest.mark.parametrize(("step", "phase"), [(0, 0), (3, 0), (5, 0), (6, 1), (9, 1)])
def test_a_model_of_another_config_is_not_resumed(step: int, phase: int) -> None:
    """Regression: weights of a save under the config of a checkpoint that has changed since."""
    own, other = tiny.config(), replace(tiny.config(), rms_norm_eps=1e-3)
    schedule = TrainingSchedule(runs.recipe())
    configs = [other, other]
    configs[phase] = own
    check_config(saved(step), configs, schedule, "runs/x")
    configs.reverse()
    with pytest.raises(UserError, match=r"rms_norm_eps was 1e-0\d and is 0.001; restore the con"):
        check_config(saved(step), configs, schedule, "runs/x")


def test_what_may_differ() -> None:
    found = saved(3)
    for changes in (
        {"name": "other"},
        {"checkpoints": {"every_steps": 7}},
        {"evaluation": {"sequences": 1}},
        {"log": {"tensorboard": False}},
        {"device": "cuda"},
        {"activation_checkpointing": "full"},
    ):
        assert resume(found, **changes).step == 3


def test_facts_survive_json(tmp_path: Path) -> None:
    """What a save holds after it was written compares as before."""
    with runs.RunFolder(tmp_path / "run") as run:
        saves = runs.CheckpointStore(run, report=pytest.fail)
        saves.write(3, [("a", torch.zeros(1))], saved(3))
    assert resume(dict(runs.saved(tmp_path / "run").metadata)).step == 3
