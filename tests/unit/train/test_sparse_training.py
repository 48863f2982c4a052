"""Training of sparse attention (DSA): gradients written out, frozen parts, exact resumption."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlat.config.model import IndexerConfig, ModelConfig
from lowlat.model.transformer import Transformer
from lowlat.ops import indexer_loss
from lowlat.train.layers.fp8 import use_fp8
from lowlat.train.layers.fused import checkpoint_activations
from lowlat.train.layers.sparse_mla import DSAStage, use_sparse_training
from lowlat.train.layers.stacked_experts import stack_experts
from lowlat.train.parallel.local_batch import local_batch
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.recipe.schema import OptimizerConfig
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.indexers import IndexerLosses
from lowlat.train.step.layerwise import layer_errors
from lowlat.train.step.loss import batch_loss, count_targets
from lowlat.train.step.optim import Optimizer
from lowlat.train.step.passes import PlainPasses
from lowlat.train.step.step import train_step
from lowlat.train.step.teacher import Teacher
from tests import configs
from tests.lowlat_configs import random_model

from . import tiny, tuning
from .naive_sparse import NaiveSparse

INDEXER = IndexerConfig(index_n_heads=3, index_head_dim=9, index_topk=3)
FULL = replace(configs.MLA, indexer=INDEXER)
SHARED = replace(FULL, indexer=replace(INDEXER, is_shared=True))
COEFF = 0.7
AHEAD = 3
WEIGHTS: dict[str, float] = {"mtp_weight": 0.3, "z_weight": 0.01}


WIDE = replace(FULL, indexer=replace(INDEXER, index_topk=tiny.LENGTH))
LAYERS = {"full": (FULL, FULL), "sharing": (FULL, SHARED), "wide": (WIDE, WIDE)}
TRAINED = ("full", "sharing")


def config(layers: str = "full") -> ModelConfig:
    """Two layers, the second of experts, and two MTP modules with indexers of their own."""
    return tiny.config(attention=LAYERS[layers])


def model(layers: str = "full", dtype: torch.dtype = torch.float64) -> Transformer:
    result = random_model(config(layers), dtype)
    stack_experts(result)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(not name.endswith("e_score_correction_bias"))
    return result


def trained(
    given: Transformer, stage: DSAStage, *, masked: bool = True, recompute: bool = False
) -> tuple[dict[str, Tensor], dict[int, tuple[float, float]]]:
    """Gradients by name, and the KL divergence and recall of every layer, means over queries."""
    use_sparse_training(given, stage)
    if recompute:
        checkpoint_activations(given)
    batch = tiny.batch(masked=masked)
    losses = IndexerLosses(given)
    with losses.observe(queries=batch.rows * tiny.LENGTH, coeff=COEFF):
        local = local_batch(ProcessMesh(), batch, AHEAD, is_sparse=True)
        targets = count_targets(batch, AHEAD)
        loss = batch_loss(given, *local, targets=targets, dtype=torch.float64, **WEIGHTS)
        loss.total.backward()
    return tiny.gradients(given), {one.layer: (one.kl, one.recall) for one in losses.records()}


def written_out(given: Transformer, stage: DSAStage, layers: str) -> tuple[Any, Any]:
    """The same by autograd alone: the gradient of the language model's loss for all weights but the
    indexers', of the KL divergence for the indexers'.
    """
    batch = tiny.batch(masked=True)
    local = local_batch(ProcessMesh(), batch, AHEAD)
    naive = NaiveSparse(batch.lengths(AHEAD), dense=stage == "warmup")
    targets = count_targets(batch, AHEAD)
    local = local._replace(attention=naive)
    loss = batch_loss(given, *local, targets=targets, dtype=torch.float64, **WEIGHTS)
    queries = batch.rows * tiny.LENGTH
    served = {0: 2, 1: 2} if layers == "sharing" else {}
    kl = sum(naive.kl[layer] / queries / served.get(layer, 1) for layer in naive.kl)
    by_name = dict(given.named_parameters())
    indexers = {name: p for name, p in by_name.items() if ".indexer." in name}
    others = {n: p for n, p in by_name.items() if n not in indexers and p.requires_grad}
    found = dict(
        zip(
            indexers,
            torch.autograd.grad(COEFF * kl, list(indexers.values()), retain_graph=True),
            strict=True,
        )
    )
    if stage == "sparse":
        gradients = torch.autograd.grad(loss.total, list(others.values()), allow_unused=True)
        found |= {n: g for n, g in zip(others, gradients, strict=True) if g is not None}
    figures = {
        layer: (naive.kl[layer].item() / queries, naive.recall[layer].item()) for layer in naive.kl
    }
    return found, figures


@pytest.mark.parametrize("layers", TRAINED)
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_gradients_written_out(stage: DSAStage, layers: str) -> None:
    """Indexers learn from the KL divergence only, the mean over the layers that they serve, all
    other weights from the language model's loss only; in the warm-up they have no gradient.
    """
    expected, figures = written_out(model(layers), stage, layers)
    found, records = trained(model(layers), stage)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    assert any(".indexer." in name and gradient.abs().max() > 0 for name, gradient in found.items())
    assert records.keys() == figures.keys()
    for layer, values in figures.items():
        assert records[layer] == pytest.approx(values, rel=1e-9)
        assert 0 < values[1] < 1


def test_gradient_by_finite_differences() -> None:
    """Of the KL divergence in the warm-up, in which nothing depends on the choice."""
    base = model()
    found, _ = trained(model(), "warmup")
    generator = torch.Generator().manual_seed(1)
    for name in ("wq_b.weight", "wk.weight", "k_norm.bias", "k_norm.weight", "weights_proj.weight"):
        path = f"layers.1.self_attn.indexer.{name}"
        start = base.get_parameter(path).detach().clone()
        direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6):
            moved = model()
            with torch.no_grad():
                moved.get_parameter(path).copy_(start + step * direction)
            _, records = trained(moved, "warmup")
            values.append(COEFF * sum(kl for kl, _ in records.values()))
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((found[path] * direction).sum().item(), rel=1e-6), name


@pytest.mark.parametrize("layers", TRAINED)
def test_blocks_and_recomputation_change_nothing(
    layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of few queries, and activation checkpointing, whose recomputation counts nothing."""
    expected, figures = trained(model(layers), "sparse")
    found, records = trained(model(layers), "sparse", recompute=True)
    assert records == figures
    tuning.assert_same(found, expected)
    monkeypatch.setattr(indexer_loss, "BLOCK_ELEMENTS", 40)
    found, records = trained(model(layers), "sparse")
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13, msg=name)
    assert {k: pytest.approx(v) for k, v in records.items()} == figures


@pytest.mark.parametrize("layers", TRAINED)
def test_indexers_learn_in_layerwise_distillation(layers: str) -> None:
    """By the KL loss of the same inputs, if the teacher has the weights of the student; also where
    layers share a choice.
    """
    expected, figures = trained(model(layers), "sparse")
    student = model(layers)
    use_sparse_training(student, "sparse")
    teacher = Teacher(model(layers), torch.float64, cross_entropy=0.0)
    batch = tiny.batch(masked=True)
    losses, targets = IndexerLosses(student), count_targets(batch, AHEAD)[0]
    with losses.observe(queries=batch.rows * tiny.LENGTH, coeff=COEFF):
        local = local_batch(ProcessMesh(), batch, AHEAD, is_sparse=True)
        options: Any = {"match": "attention", "targets": targets, "dtype": torch.float64}
        layer_errors(student, teacher, *local, **options)
    found = tiny.gradients(student)
    names = [name for name in expected if ".indexer." in name and not name.startswith("mtp")]
    assert names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-10, msg=name)
    assert all(one.kl == pytest.approx(figures[one.layer][0]) for one in losses.records()[:2])


def test_forward_is_that_of_inference() -> None:
    """Over the chosen tokens in the sparse stage, over all in the warm-up."""
    batch = tiny.batch(masked=True)
    plain = model().eval()
    for stage in ("sparse", "warmup"):
        used = model()
        use_sparse_training(used, stage)
        local = local_batch(ProcessMesh(), batch, AHEAD, is_sparse=True)
        reference = local_batch(ProcessMesh(), batch, AHEAD)
        if stage == "warmup":
            layers = [replace(FULL, indexer=replace(INDEXER, index_topk=99))] * 2
            plain = Transformer(replace(config(), attention=tuple(layers)), dtype=torch.float64)
            stack_experts(plain)
            plain.load_state_dict(used.state_dict())
        ids = batch.tokens[:, : tiny.LENGTH].flatten()
        with torch.no_grad():
            found = used(ids, local.positions, local.attention)
            expected = plain(ids, reference.positions, reference.attention)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_contexts_within_topk_are_dense() -> None:
    """Every token is chosen: KL divergence and gradients of indexers are those of the warm-up,
    gradients of other weights those of dense attention.
    """
    (warm, first), (found, second) = (trained(model("wide"), s) for s in ("warmup", "sparse"))
    assert first == {k: pytest.approx(v) for k, v in second.items()}
    assert warm and all(".indexer." in name for name in warm)
    dense = Transformer(tiny.config(attention=configs.MLA), dtype=torch.float64)
    stack_experts(dense)
    weights = {n: w for n, w in model("wide").state_dict().items() if ".indexer." not in n}
    dense.load_state_dict(weights)
    batch = tiny.batch(masked=True)
    options: Any = {"targets": count_targets(batch, AHEAD), "dtype": torch.float64, **WEIGHTS}
    batch_loss(dense, *local_batch(ProcessMesh(), batch, AHEAD), **options).total.backward()
    for name, gradient in (warm | tiny.gradients(dense)).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-11, msg=name)


def test_warm_up_lowers_the_divergence_and_moves_nothing_else() -> None:
    """Routing biases stay, too."""
    made = random_model(config(), torch.float32)
    stack_experts(made)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    use_sparse_training(made, "warmup")
    optimizer = Optimizer(made, OptimizerConfig(weight_decay=0.0), tiny.unsharded(made))
    losses = IndexerLosses(made)
    balancer = LoadBalancer(made, sequence_weight=0.01)
    plan = tiny.plan(dsa_stage="warmup", learning_rate=1e-2)
    passes = PlainPasses(made, torch.float32)
    results = [
        train_step(
            passes, optimizer, balancer, tiny.batch(), plan, num_ahead=AHEAD, indexers=losses
        )
        for _ in range(30)
    ]
    moved = {n for n, p in made.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if ".indexer." in name}
    first, last = results[0].indexers, results[-1].indexers
    assert [one.layer for one in last] == [0, 1, 2, 3]
    assert all(after.kl < 0.7 * old.kl for old, after in zip(first, last, strict=True))
    assert not results[0].losses, "no head is trained"


def test_fp8_products_of_the_indexer() -> None:
    """wq_b and wk compute in FP8 as the other projections, weights_proj in fp32; keys and values
    come from the FP8 product with kv_b_proj, so that with all tokens chosen the gradients are those
    of dense MLA in FP8. Activations are fp32: bf16 would choose other experts.
    """
    made = model("wide", torch.float32)
    dense = Transformer(tiny.config(attention=configs.MLA), dtype=torch.float32)
    stack_experts(dense)
    weights = {n: w.clone() for n, w in made.state_dict().items() if ".indexer." not in n}
    dense.load_state_dict(weights)
    use_fp8(made)
    use_fp8(dense)
    use_sparse_training(made, "sparse")
    batch, losses = tiny.batch(), IndexerLosses(made)
    with losses.observe(queries=batch.rows * tiny.LENGTH, coeff=COEFF):
        for each in (made, dense):
            local = local_batch(ProcessMesh(), batch, AHEAD, is_sparse=each is made)
            targets = count_targets(batch, AHEAD)
            options: Any = {"targets": targets, "dtype": torch.float32, **WEIGHTS}
            batch_loss(each, *local, **options).total.backward()
    kinds = {type(m).__name__ for n, m in made.named_modules() if n.endswith(("wq_b", ".wk"))}
    assert kinds == {"Fp8Linear"}
    found, expected = tiny.gradients(made), tiny.gradients(dense)
    assert {name for name in found if ".indexer." not in name} == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 0.01, name
