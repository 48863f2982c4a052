"""Whole optimiser steps against the paper written out, and steps that must not move anything."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import final

import pytest
import torch
from torch import Tensor

from lowlat.data.batch import Batch
from lowlat.model.expert_loads import gates
from lowlat.model.transformer import Transformer
from lowlat.train.recipe.schedule import StepPlan
from lowlat.train.recipe.schema import OptimizerConfig
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.optim import Optimizer
from lowlat.train.step.passes import Passes, PlainPasses
from lowlat.train.step.step import StepResult, evaluate, train_step

from . import tiny
from .naive import NaiveModel

ALPHA, GAMMA = 0.05, 0.01
TABLE = OptimizerConfig(eps=1e-4, max_grad_norm=0.5)
"""An epsilon so large that no update follows the rounding of a gradient near zero."""


def parts(model: Transformer) -> tuple[Optimizer, LoadBalancer]:
    return Optimizer(model, TABLE, tiny.unsharded(model)), LoadBalancer(
        model, sequence_weight=ALPHA
    )


def test_steps_written_out() -> None:
    """Two steps: every loss, the global norm, every weight by torch's AdamW over the naive
    gradients, and routing biases moved by the loads of the whole batch after the update.
    """
    model = tiny.model(tiny.config())
    optimizer, balancer = parts(model)
    naive = NaiveModel(model.config, dict(model.named_parameters()))
    leaves = {name: leaf for name, leaf in naive.leaves.items() if leaf.requires_grad}
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in leaves.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in leaves.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    biases = [leaf for name, leaf in naive.leaves.items() if name.endswith("correction_bias")]
    for seed in range(2):
        torch.manual_seed(seed)
        batch = tiny.batch(masked=True)
        batch.tokens.copy_(torch.randint_like(batch.tokens, tiny.VOCAB))
        plan = tiny.plan(micro_batch_size=2, bias_update_speed=GAMMA, z_weight=0.01)
        result = train_step(
            PlainPasses(model, torch.float64), optimizer, balancer, batch, plan, num_ahead=3
        )
        wanted = naive.losses(batch, mtp_weight=0.3, z_weight=0.01, alpha=ALPHA)
        wanted.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 0.5)
        reference.step()
        reference.zero_grad()
        with torch.no_grad():
            for bias, load in zip(biases, wanted.loads, strict=True):
                bias += GAMMA * (load.mean() - load).sign()
        assert result.losses == pytest.approx([head.item() for head in wanted.heads], rel=1e-9)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-8)
        assert result.z == pytest.approx(wanted.z.item(), rel=1e-9)
        assert result.sequence_loss == pytest.approx(wanted.sequence.item(), rel=1e-9)
        assert result.is_finite
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach().double(), naive.leaves[name].detach(), rtol=1e-7, atol=1e-7, msg=name
        )


@final
class Poisoned(Passes):
    """Adds `value` to the losses or to the gradient of one parameter."""

    def __init__(self, inner: Passes, model: Transformer, value: float, where: str) -> None:
        self._inner, self._model, self._value, self._where = inner, model, value, where

    def backward(self, batch: Batch, plan: StepPlan, targets: Sequence[int]) -> Tensor:
        sums = self._inner.backward(batch, plan, targets)
        gradient = self._model.norm.weight.grad
        assert gradient is not None
        if self._where == "gradient":
            gradient[3] += self._value
        else:
            sums[int(self._where)] += self._value
        return sums

    def likelihood(self, batch: Batch) -> Tensor:
        return self._inner.likelihood(batch)


def state(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *optimizer.tensors()]
    return {name: tensor.detach().clone() for name, tensor in named}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["gradient", "0", "2"])
def test_a_step_that_is_not_finite_moves_nothing(where: str, value: float) -> None:
    """No weight, no moment, no routing bias; the next step is as if it had not been."""
    model = tiny.model(tiny.config())
    optimizer, balancer = parts(model)
    plain = PlainPasses(model, torch.float64)

    def step(passes: Passes) -> StepResult:
        plan = tiny.plan(bias_update_speed=GAMMA)
        return train_step(passes, optimizer, balancer, tiny.batch(), plan, num_ahead=3)

    assert step(plain).is_finite
    before = state(model, optimizer)
    assert not step(Poisoned(plain, model, value, where)).is_finite
    after = state(model, optimizer)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(p.grad is None for p in model.parameters())
    assert step(plain).is_finite


def test_losses_fall() -> None:
    """A batch seen again and again is learnt: every head's loss falls, MTP modules' too."""
    model = tiny.model(tiny.config())
    optimizer, balancer = parts(model)
    results = [
        train_step(
            PlainPasses(model, torch.float64),
            optimizer,
            balancer,
            tiny.batch(),
            tiny.plan(micro_batch_size=tiny.ROWS),
            num_ahead=3,
        )
        for _ in range(20)
    ]
    for first, last in zip(results[0].losses, results[-1].losses, strict=True):
        assert last < 0.8 * first


def test_evaluation_is_the_mean_over_targets() -> None:
    """Of all batches together, however many targets each has; nothing is left behind."""
    model = tiny.model(tiny.config())
    batch = tiny.batch(masked=True)
    batch.loss_mask[0] = False
    passes = PlainPasses(model, torch.float64)
    naive = NaiveModel(model.config, dict(model.named_parameters()))
    wanted = naive.losses(batch, mtp_weight=0.0, z_weight=0.0, alpha=0.0)
    for rows in (1, 2, tiny.ROWS):
        losses = evaluate(passes, batch.split(rows), num_ahead=3)
        assert losses == pytest.approx([head.item() for head in wanted.heads], rel=1e-9)
    assert all(p.grad is None for p in model.parameters())
    biases = [gate.e_score_correction_bias for _, gate in gates(model)]
    assert all(bias is not None and not bias.requires_grad for bias in biases)


def blind() -> Batch:
    """Nothing of it is a target."""
    batch = tiny.batch()
    return replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))


def test_a_batch_without_targets_moves_nothing() -> None:
    """Nothing is known of its loss, and decay alone does not move weights either."""
    model = tiny.model(tiny.config())
    optimizer, balancer = parts(model)
    passes = PlainPasses(model, torch.float64)
    plan = tiny.plan(bias_update_speed=GAMMA)
    train_step(passes, optimizer, balancer, tiny.batch(), plan, num_ahead=3)
    before = state(model, optimizer)
    result = train_step(passes, optimizer, balancer, blind(), plan, num_ahead=3)
    assert result.losses == () and result.matched is None
    assert result.is_finite and not result.has_targets
    after = state(model, optimizer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_heads_without_targets_have_no_loss() -> None:
    """Every second token is a target: the main head learns, MTP modules have nothing to."""
    model = tiny.model(tiny.config())
    optimizer, balancer = parts(model)
    passes = PlainPasses(model, torch.float64)
    batch = blind()
    batch.loss_mask[:, 1::2] = True
    before = state(model, optimizer)
    (loss,) = train_step(passes, optimizer, balancer, batch, tiny.plan(), num_ahead=3).losses
    assert loss > 0 and not torch.equal(before["norm.weight"], model.norm.weight)
    main, *mtp = evaluate(passes, [batch], num_ahead=3)
    assert main > 0 and all(math.isnan(one) for one in mtp)


def test_biases_are_those_the_step_leaves() -> None:
    """Regression: a log in which routing biases lag a step behind."""
    model = tiny.model(tiny.config())
    optimizer, balancer = parts(model)
    plan = tiny.plan(bias_update_speed=GAMMA)
    passes = PlainPasses(model, torch.float64)
    result = train_step(passes, optimizer, balancer, tiny.batch(), plan, num_ahead=3)
    for load, (_, gate) in zip(result.loads, gates(model), strict=True):
        bias = gate.e_score_correction_bias
        assert bias is not None
        assert (load.bias_min, load.bias_max) == (bias.min().item(), bias.max().item())
