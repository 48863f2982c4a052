"""Loads, the bias that evens them out, and the sequence-wise loss, against hand and formula."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowlat.data.batch import Batch
from lowlat.model.expert_loads import gates
from lowlat.model.moe import MoE
from lowlat.model.transformer import Transformer
from lowlat.train.layers.fused import checkpoint_activations
from lowlat.train.recipe.schema import OptimizerConfig
from lowlat.train.step.balance import (
    LoadBalancer,
    choice_frequency,
    mean_share,
)
from lowlat.train.step.optim import Optimizer
from lowlat.train.step.passes import PlainPasses
from lowlat.train.step.step import evaluate, train_step

from . import tiny
from .naive import NaiveModel


def observed(
    model: Transformer, batch: Batch, *, rows: int = 1, alpha: float = 0.0
) -> LoadBalancer:
    """A balancer that has seen `batch` in micro-batches of `rows`."""
    balancer = LoadBalancer(model, sequence_weight=alpha)
    plan = tiny.plan(micro_batch_size=rows)
    with balancer.observe(sequence_length=tiny.LENGTH, num_sequences=batch.rows):
        PlainPasses(model, torch.float64).backward(batch, plan, [1] * (1 + len(model.mtp)))
    balancer.reduce()
    return balancer


def biases(model: Transformer) -> list[Tensor]:
    found = [gate.e_score_correction_bias for _, gate in gates(model)]
    return [bias.detach().clone() for bias in found if bias is not None]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [1, 2, tiny.ROWS])
def test_loads_of_the_whole_batch(rows: int, recompute: bool) -> None:
    """Every choice of every micro-batch counts once, MTP modules' too.

    Regression: loads of the last micro-batch alone, and recomputed layers counted twice.
    """
    model, batch = tiny.model(tiny.config()), tiny.batch()
    if recompute:
        checkpoint_activations(model)
    naive = NaiveModel(model.config, dict(model.named_parameters()))
    wanted = naive.losses(batch, mtp_weight=1.0, z_weight=0.0, alpha=1.0)
    balancer = observed(model, batch, rows=rows, alpha=1.0)
    loads = balancer.loads()
    assert [load.layer for load in loads] == [1, 2, 3]
    for one, load, choices in zip(balancer._gates, loads, wanted.loads, strict=True):
        assert torch.equal(one.counters, choices)
        assert choices.sum() == 2 * tiny.ROWS * tiny.LENGTH
        assert load.load == pytest.approx((choices / choices.sum()).tolist())
        assert load.max_violation == pytest.approx((choices.max() / choices.mean() - 1).item())
    assert balancer.sequence_loss == pytest.approx(wanted.sequence.item(), rel=1e-9)


def test_bias_moves_against_the_load() -> None:
    """Up where an expert has less than the mean, down where it has more, untouched at the mean."""
    model = tiny.model(tiny.config())
    balancer = LoadBalancer(model, sequence_weight=0.0)
    before = biases(model)
    counts = torch.tensor([0.0, 5.0, 2.0, 2.0, 2.0, 1.0])
    for one in balancer._gates:
        one.counters[:] = counts
    balancer.update_biases(0.125)
    for old, new in zip(before, biases(model), strict=True):
        moved = torch.tensor([0.125, -0.125, 0.0, 0.0, 0.0, 0.125])
        torch.testing.assert_close(new - old, moved, rtol=0, atol=1e-7)
        assert new.dtype == torch.float32
    balancer.update_biases(0.0)
    assert all(map(torch.equal, biases(model), biases(model)))


def test_the_load_balancer_is_on_the_device_of_the_model() -> None:
    """Without gates too: a process of a pipeline that has none sums with those that have some.

    Regression: one process that waits in gloo for another that waits in NCCL.
    """
    for model_config in (tiny.config(), tiny.config(moe=None)):
        balancer = LoadBalancer(tiny.model(model_config).to("meta"), sequence_weight=1.0)
        assert balancer._sequence_loss.device.type == "meta"
        balancer.reduce()
        assert balancer._sequence_loss.device.type == "meta"


def test_only_observed_passes_count() -> None:
    model, batch = tiny.model(tiny.config()), tiny.batch()
    balancer = observed(model, batch, alpha=1.0)
    before = [load.load for load in balancer.loads()]
    loss = balancer.sequence_loss
    evaluate(PlainPasses(model, torch.float64), [tiny.batch(rows=2)], num_ahead=3)
    assert before == [load.load for load in balancer.loads()]
    assert balancer.sequence_loss == loss
    again = observed(model, batch, alpha=1.0)
    assert before == [load.load for load in again.loads()]


def test_the_load_balancer_drops_the_previous_batch() -> None:
    model = tiny.model(tiny.config())
    balancer = LoadBalancer(model, sequence_weight=1.0)
    seen = []
    for _ in range(2):
        with balancer.observe(sequence_length=tiny.LENGTH, num_sequences=tiny.ROWS):
            PlainPasses(model, torch.float64).backward(tiny.batch(), tiny.plan(), [1, 1, 1])
        seen.append((balancer.sequence_loss, [one.counters.clone() for one in balancer._gates]))
    assert seen[0][0] == seen[1][0]
    assert all(map(torch.equal, seen[0][1], seen[1][1]))


def sequence_balance_loss(scores: Tensor, chosen: int) -> Tensor:
    return (choice_frequency(scores, chosen) * mean_share(scores)).sum(dim=-1)


def test_sequence_loss_by_hand() -> None:
    """Two tokens, three experts, one chosen: f counts the best unbiased score, P is the mean share
    (DeepSeek-V3 equations 17 to 20).
    """
    scores = torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.1, 0.5]]], dtype=torch.float64)
    assert choice_frequency(scores, 1).tolist() == [[1.5, 0.0, 1.5]]
    shares = mean_share(scores)[0].tolist()
    assert shares == pytest.approx([(0.6 + 0.25) / 2, (0.3 + 0.125) / 2, (0.1 + 0.625) / 2])
    expected = 1.5 * (0.425 + 0.3625)
    assert sequence_balance_loss(scores, 1).tolist() == pytest.approx([expected])


def test_sequence_loss_of_perfect_balance_is_one() -> None:
    scores = torch.eye(6, dtype=torch.float64)[None] + 0.5
    assert sequence_balance_loss(scores, 1).item() == pytest.approx(1.0)


def test_sequence_loss_is_differentiated_by_shares_alone() -> None:
    scores = torch.rand(3, 5, 7, dtype=torch.float64).requires_grad_()
    loss = sequence_balance_loss(scores, 2).sum()
    (found,) = torch.autograd.grad(loss, [scores])
    fixed = choice_frequency(scores.detach(), 2)[:, None]
    (wanted,) = torch.autograd.grad(
        (fixed * scores / scores.sum(-1, keepdim=True)).mean(1).sum(), [scores]
    )
    torch.testing.assert_close(found, wanted)


def test_sequence_loss_ignores_the_bias() -> None:
    """f_i counts what the gate would choose without its bias, as the paper writes it."""
    model, batch = tiny.model(tiny.config()), tiny.batch()
    losses = []
    for shift in (0.0, 100.0):
        for _, gate in gates(model):
            assert gate.e_score_correction_bias is not None
            gate.e_score_correction_bias.data[0] += shift
        one = replace(batch, tokens=batch.tokens[:1], loss_mask=batch.loss_mask[:1])
        balancer = LoadBalancer(model, sequence_weight=1.0)
        seen: list[Tensor] = []
        for _, gate in list(gates(model))[:1]:
            gate.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.scores))
        with balancer.observe(sequence_length=tiny.LENGTH, num_sequences=1):
            PlainPasses(model, torch.float64).backward(one, tiny.plan(), [1, 1, 1])
        first = sequence_balance_loss(seen[0][None], 2).item()
        losses.append(first)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_an_unbalanced_router_becomes_balanced() -> None:
    """The bias alone: nothing learns, and MaxVio falls while it moves; groups stay respected."""
    config = tiny.config(num_nextn_predict_layers=0, vocab_size=211)
    model = tiny.model(config)
    direction = torch.linspace(-1, 1, config.hidden_size).sign().double()
    with torch.no_grad():
        model.embed_tokens.weight += 2 * direction
        for _, gate in gates(model):
            assert gate.e_score_correction_bias is not None
            gate.e_score_correction_bias.zero_()
            # A direction that all tokens share makes experts 1 and 2 everyone's.
            gate.weight.mul_(0.3)
            gate.weight[1:3] += direction
    optimizer = Optimizer(model, OptimizerConfig(weight_decay=0.0), tiny.unsharded(model))
    balancer = LoadBalancer(model, sequence_weight=0.0)
    tokens = torch.randint(211, (13, 24))
    batch = Batch(tokens=tokens, loss_mask=torch.ones_like(tokens, dtype=torch.bool))
    chosen: list[Tensor] = []
    gate = next(iter(gates(model)))[1]
    gate.register_forward_hook(lambda _m, _i, out: chosen.append(out.experts))
    violations = []
    for step in range(36):
        speed = 0.03 if step < 20 else 0.003
        plan = tiny.plan(micro_batch_size=7, bias_update_speed=speed, learning_rate=0.0)
        result = train_step(
            PlainPasses(model, torch.float64), optimizer, balancer, batch, plan, num_ahead=1
        )
        violations.append(result.loads[0].max_violation)
    assert violations[0] > 1.0
    assert max(violations[-5:]) < 0.25 * violations[0]
    groups = torch.cat(chosen) // 3
    assert bool((groups[:, 0] == groups[:, 1]).all())
    assert all(bias.dtype == torch.float32 for bias in biases(model))


def test_the_bias_is_no_parameter_of_the_optimiser() -> None:
    model = tiny.model(tiny.config())
    before = biases(model)
    optimizer = Optimizer(model, OptimizerConfig(), tiny.unsharded(model))
    balancer = LoadBalancer(model, sequence_weight=1e-4)
    plan = tiny.plan(bias_update_speed=0.0)
    train_step(
        PlainPasses(model, torch.float64), optimizer, balancer, tiny.batch(), plan, num_ahead=3
    )
    assert all(map(torch.equal, before, biases(model)))
    assert not any("e_score" in name for name, _ in optimizer.tensors())


def test_gates_without_a_bias_and_models_without_gates() -> None:
    """Greedy gates have nothing to move, dense models nothing to balancer."""
    moe = tiny.config().moe
    assert moe is not None
    softmax = replace(
        moe, topk_method="greedy", scoring_func="softmax", n_group=1, norm_topk_prob=False
    )
    model = tiny.model(tiny.config(moe=softmax))
    balancer = observed(model, tiny.batch(), alpha=0.1)
    balancer.update_biases(0.1)
    load = balancer.loads()[0]
    assert (load.bias_min, load.bias_max) == (0.0, 0.0)
    dense = tiny.model(tiny.config(moe=None))
    balancer = observed(dense, tiny.batch(), alpha=0.1)
    balancer.update_biases(0.1)
    assert balancer.loads() == [] and balancer.sequence_loss == 0.0
    assert not any(isinstance(module, MoE) for module in dense.modules())


def test_entropies() -> None:
    model, batch = tiny.model(tiny.config()), tiny.batch()
    balancer = observed(model, batch)
    for one, load in zip(balancer._gates, balancer.loads(), strict=True):
        counts = one.counters[one.counters > 0]
        shares = counts / counts.sum()
        entropy = -(shares * shares.log()).sum() / torch.tensor(6.0).log()
        assert load.entropy == pytest.approx(entropy.item(), rel=1e-6)
