"""Losses and all their gradients against the paper's formulas written out in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowlat.attention.flash import FlashAttention
from lowlat.data.batch import Batch
from lowlat.model.transformer import Transformer
from lowlat.train.layers.fused import checkpoint_activations
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.loss import batch_loss, count_targets, counted
from lowlat.train.step.passes import PlainPasses

from . import tiny
from .naive import NaiveModel

MTP_WEIGHT, Z_WEIGHT, ALPHA = 0.3, 0.02, 0.7


def trained(
    model: Transformer, batch: Batch, rows: int = 1, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, dict[str, Tensor], float]:
    """Mean losses, gradients and sequence loss of `model`, in micro-batches of `rows`."""
    ahead = 1 + len(model.mtp)
    plan = tiny.plan(micro_batch_size=rows, mtp_weight=MTP_WEIGHT, z_weight=Z_WEIGHT)
    balancer = LoadBalancer(model, sequence_weight=ALPHA)
    targets = count_targets(batch, ahead)
    length = batch.sequence_length(ahead)
    model.zero_grad()
    with balancer.observe(sequence_length=length, num_sequences=batch.rows):
        sums = PlainPasses(model, dtype).backward(batch, plan, targets)
    means = sums / torch.tensor([*targets, targets[0]])
    return means, tiny.gradients(model), balancer.sequence_loss


CASES: dict[str, dict[str, Any]] = {
    "two MTP modules": {},
    "own MTP head and embedding": {"num_nextn_predict_layers": 1, "mtp_copies": True},
    "tied": {"tie_word_embeddings": True},
    "no MTP": {"num_nextn_predict_layers": 0, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_losses_and_gradients(changes: dict[str, Any], masked: bool) -> None:
    """Main, MTP, z and balance losses, their weights, masks and borders of documents."""
    config = tiny.config(**changes)
    model = tiny.model(config)
    batch = tiny.batch(ahead=1 + config.num_nextn_predict_layers, masked=masked)
    naive = NaiveModel(config, dict(model.named_parameters()))
    wanted = naive.losses(batch, mtp_weight=MTP_WEIGHT, z_weight=Z_WEIGHT, alpha=ALPHA)
    wanted.total.backward()
    means, gradients, sequence_loss = trained(model, batch, rows=2)
    torch.testing.assert_close(means, torch.stack([*wanted.heads, wanted.z]).detach())
    assert sequence_loss == pytest.approx(wanted.sequence.item(), rel=1e-9)
    expected = {n: leaf.grad for n, leaf in naive.leaves.items() if leaf.grad is not None}
    assert gradients.keys() == expected.keys()
    assert len(gradients) == sum(leaf.requires_grad for leaf in naive.leaves.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11, msg=name)


def test_micro_batches_change_nothing() -> None:
    """Regression: means per micro-batch, which weigh rows with few targets too much."""
    model, batch = tiny.model(tiny.config()), tiny.batch(masked=True)
    batch.loss_mask[0] = False
    whole = trained(model, batch, rows=tiny.ROWS)
    for rows in (1, 2, 3):
        means, gradients, sequence_loss = trained(model, batch, rows=rows)
        torch.testing.assert_close(means, whole[0])
        assert sequence_loss == pytest.approx(whole[2], rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[1][name], rtol=1e-9, atol=1e-12)


def test_recomputed_layers_have_the_same_gradients() -> None:
    model, batch = tiny.model(tiny.config()), tiny.batch(masked=True)
    kept = trained(model, batch, rows=2)
    checkpoint_activations(model)
    again = trained(model, batch, rows=2)
    assert torch.equal(kept[0], again[0]) and kept[2] == again[2]
    assert all(torch.equal(again[1][name], gradient) for name, gradient in kept[1].items())


def test_a_weight_of_zero_takes_a_loss_out() -> None:
    model, batch = tiny.model(tiny.config()), tiny.batch()
    attention = FlashAttention(batch.lengths(3))

    def loss(mtp_weight: float, z_weight: float) -> float:
        parts = batch_loss(
            model,
            batch,
            attention,
            attention.positions(),
            targets=count_targets(batch, 3),
            mtp_weight=mtp_weight,
            z_weight=z_weight,
            dtype=torch.float64,
        )
        main, first, second = (parts.heads / tiny.ROWS / tiny.LENGTH).tolist()
        z = parts.z.item() / tiny.ROWS / tiny.LENGTH
        expected = main + mtp_weight * (first + second) / 2 + z_weight * z
        assert parts.total.item() == pytest.approx(expected, rel=1e-12)
        return parts.total.item()

    assert loss(0.0, 0.0) < loss(0.1, 0.0) < loss(0.3, 0.0) < loss(0.3, 0.01)


def test_which_targets_count() -> None:
    """An MTP module predicts nothing across the border of a document, nor from beyond a token
    without prediction.
    """
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    loss_mask = torch.tensor([[False, True, True, False, True, True, False, True]])
    batch = Batch(tokens=tokens, loss_mask=loss_mask, documents=((3, 2),))
    main, first, second = (counted(batch, 3, depth)[0].tolist() for depth in range(3))
    assert main == [True, True, False, True, True]
    assert first == [True, False, False, True, False]
    assert second == [False, False, False, False, False]
    assert count_targets(batch, 3) == [4, 2, 0]


def test_a_batch_without_targets_costs_nothing() -> None:
    """As a window of a chat may be, in which the user alone speaks."""
    model, batch = tiny.model(tiny.config()), tiny.batch()
    batch.loss_mask[:] = False
    watch_free = PlainPasses(model, torch.float64)
    sums = watch_free.backward(batch, tiny.plan(), count_targets(batch, 3))
    assert sums.tolist() == [0.0] * 4
    assert all(gradient.count_nonzero() == 0 for gradient in tiny.gradients(model).values())


def test_bf16_activations_and_fp32_masters() -> None:
    """Gradients are fp32, and near those of fp32 activations."""
    model = tiny.model(tiny.config(), torch.float32)
    batch = tiny.batch(masked=True)
    exact_means, exact, _ = trained(model, batch, rows=2, dtype=torch.float32)
    means, rough, _ = trained(model, batch, rows=2, dtype=torch.bfloat16)
    torch.testing.assert_close(means, exact_means, rtol=0.05, atol=0.02)
    assert not torch.equal(means, exact_means)
    left, right = (torch.cat([g[n].flatten() for n in exact]) for g in (exact, rough))
    assert {gradient.dtype for gradient in rough.values()} == {torch.float32}
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.97
