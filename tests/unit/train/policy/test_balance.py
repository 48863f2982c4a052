"""Sequence-wise balance loss of sampled sequences: that of pretraining, for any lengths."""

from copy import deepcopy

import pytest
import torch

from lowlat.model.expert_loads import gates
from lowlat.train.policy.balance import SequenceBalance
from lowlat.train.step.balance import LoadBalancer
from tests.unit.train import tiny

LENGTHS, ALPHA = (3, 7), 0.1


def test_the_loss_is_that_of_pretraining() -> None:
    """Sequence by sequence."""
    model = tiny.model(tiny.config())
    other = deepcopy(model)
    (_, packed), (_, single) = next(gates(model)), next(gates(other))
    x = torch.randn(sum(LENGTHS), model.config.hidden_size, dtype=torch.float64)
    balance = SequenceBalance()
    balance.watch(packed)
    balance.weight, balance.lengths = ALPHA / len(LENGTHS), LENGTHS
    packed(x).weights.sum().backward()
    balancer = LoadBalancer(other, sequence_weight=ALPHA)
    total = 0.0
    for part in x.split(LENGTHS):
        with balancer.observe(sequence_length=len(part), num_sequences=len(LENGTHS)):
            single(part).weights.sum().backward()
            total += balancer.sequence_loss
    assert balance.loss == pytest.approx(total) and total > 0
    assert packed.weight.grad is not None and single.weight.grad is not None
    torch.testing.assert_close(packed.weight.grad, single.weight.grad)
