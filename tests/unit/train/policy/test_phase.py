"""Steps of a GRPO phase around its passes: what a step that fails or counts nothing leaves."""

import math
from typing import Any
from unittest.mock import create_autospec

import pytest

from lowlat.train.metrics.record import RolloutRecord
from lowlat.train.policy.forward import PolicySequence
from lowlat.train.policy.generation import GenerationFigures, Generator
from lowlat.train.policy.learner import PolicyBatch, PolicyFigures, PolicyLearner, largest
from lowlat.train.policy.phase import GRPOPhase
from lowlat.train.policy.rollouts import RolloutEngine
from lowlat.train.rewards.sample import RewardFailure
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.optim import Optimizer
from lowlat.train.step.step import StepResult
from tests.unit.train import tiny

GENERATED = GenerationFigures(
    reward=1.0, reward_std=0.0, length=1.0, truncated=0.0, no_signal=0.0, failed=3
)


def spec(kind: type) -> Any:
    return create_autospec(kind, instance=True)


class Rig:
    """A phase whose passes give `figures`; its other parts are mocks."""

    def __init__(self, figures: PolicyFigures) -> None:
        self.learner, self.engine = spec(PolicyLearner), spec(RolloutEngine)
        self.optimizer, self.balancer = spec(Optimizer), spec(LoadBalancer)
        self.generator = spec(Generator)
        self.generator.draws, self.generator.tokens_per_second = 0, 1.0
        self.generator.failure = None
        self.generator.batch.side_effect = self._batch
        self.learner.accumulate.return_value = figures
        self.optimizer.step.return_value = 1.0
        self.balancer.loads.return_value = ()
        self.notes: list[str] = []
        self.phase = GRPOPhase(self.learner, self.engine, self.generator, iterations=2)

    def _batch(self, rows: int, step: int) -> tuple[PolicyBatch, GenerationFigures]:
        self.generator.draws += rows
        sequences = [PolicySequence(prompt=(1,), completion=(2,))]
        return PolicyBatch(sequences=sequences, advantages=[0.5], is_counted=[True]), GENERATED

    def step(self) -> tuple[StepResult, RolloutRecord]:
        return self.phase.step(tiny.plan(), self.optimizer, self.balancer, self.notes.append)

    def state(self) -> dict[str, Any]:
        return {name: tensor.tolist() for name, tensor in self.phase.state()}


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf)])
@pytest.mark.parametrize("updates", [0, 1, 2])
def test_a_step_that_is_not_finite_leaves_the_state_before_it(
    loss: float, norm: float, updates: int
) -> None:
    rig = Rig(PolicyFigures(loss=1.0, tokens=1))
    for _ in range(updates):
        rig.step()
    before = rig.state()
    rig.learner.accumulate.return_value = PolicyFigures(loss=loss, tokens=1)
    rig.optimizer.step.return_value = norm
    result, _ = rig.step()
    assert not result.is_finite
    assert rig.state() == before


def test_a_batch_without_counted_tokens_updates_nothing() -> None:
    rig = Rig(PolicyFigures(num_inputs=7))
    rig.generator.failure = RewardFailure("r.py", "raised", "why")
    result, _ = rig.step()
    assert result.is_finite and not result.has_targets and result.num_inputs == 7
    rig.optimizer.step.assert_not_called()
    rig.balancer.update_biases.assert_not_called()
    rig.optimizer.zero_grad.assert_called_once()
    assert rig.notes == ["step 1: 3 completions have no reward, one because of r.py: raised: why"]


@pytest.mark.parametrize(("mismatch", "notes"), [(None, 0), (0.0, 0), (1e-6, 1), (math.nan, 1)])
def test_log_probabilities_that_differ_are_noted(mismatch: float | None, notes: int) -> None:
    rig = Rig(PolicyFigures(loss=1.0, tokens=1, mismatch=mismatch))
    _, record = rig.step()
    assert record.mismatch is mismatch
    assert len(rig.notes) == notes


def test_the_largest_difference_keeps_nan() -> None:
    assert largest(0.0, 2.0, 1.0) == 2.0
    assert math.isnan(largest(0.0, math.nan)) and math.isnan(largest(math.nan, 0.0))
