"""Which process has what of a model, and that the stages together are the model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlat.config.model import IndexerConfig, ModelConfig
from lowlat.data.batch import Batch
from lowlat.model.transformer import Transformer
from lowlat.plan.stages import PipelineStage
from lowlat.train.layers.fused import checkpoint_activations
from lowlat.train.parallel.local_batch import local_batch
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.pipeline.stages import (
    FOLDED,
    Schedule,
    StageInputs,
    StageModule,
    divide,
    holders_of_embedding,
    keep_stages,
)
from lowlat.train.step.loss import batch_loss, count_targets
from tests import configs
from tests.unit.train import tiny

LAYERS = 7
SCHEDULES: list[Schedule] = ["1f1b", "interleaved", "zb", "zbv", "dualpipev"]


def config(**changes: Any) -> ModelConfig:
    return tiny.config(num_hidden_layers=LAYERS, **changes)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_layer_is_in_one_stage(schedule: Schedule, size: int) -> None:
    division = divide(config(), schedule, size, tiny.LENGTH)
    stages = sorted((stage for own in division for stage in own), key=lambda stage: stage.index)
    assert [stage.index for stage in stages] == list(range(len(stages)))
    assert [layer for stage in stages for layer in stage.layers] == list(range(LAYERS))
    assert [stage.is_first for stage in stages].index(True) == 0
    assert [stage.is_last for stage in stages].index(True) == len(stages) - 1
    per_process = 1 if schedule in ("1f1b", "zb") else 2
    assert [len(own) for own in division] == [per_process] * size


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_layers_that_share_a_choice_are_in_one_stage(schedule: Schedule) -> None:
    """Layers 1 and 2 attend to the tokens of layer 0, layer 4 to those of layer 3."""
    shares = (False, True, True, False, True, False, False)
    own = replace(
        configs.MLA, indexer=IndexerConfig(index_n_heads=1, index_head_dim=8, index_topk=3)
    )
    assert own.indexer is not None
    layers = tuple(replace(own, indexer=replace(own.indexer, is_shared=one)) for one in shares)
    division = divide(config(attention=layers, model_type="lowlat"), schedule, 2, tiny.LENGTH)
    stages = sorted((stage for held in division for stage in held), key=lambda stage: stage.index)
    assert [layer for stage in stages for layer in stage.layers] == list(range(LAYERS))
    assert all(stage.layers[0] in (0, 3, 5, 6) for stage in stages if stage.layers)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_folded_pipeline_ends_where_it_begins(schedule: Schedule) -> None:
    """So that the embedding of MTP modules is the first stage's own."""
    division = divide(config(), schedule, 3, tiny.LENGTH)
    assert division[0][0].is_first
    assert division[0][-1].is_last == (schedule in FOLDED)
    holders = holders_of_embedding(config(), division)
    assert holders == ([0] if schedule in FOLDED else [0, 2])


def test_the_embedding_is_at_one_end_where_nothing_asks_for_it() -> None:
    plain = config(num_nextn_predict_layers=0)
    assert holders_of_embedding(plain, divide(plain, "1f1b", 2, tiny.LENGTH)) == [0]
    copies = config(mtp_copies=True)
    assert holders_of_embedding(copies, divide(copies, "1f1b", 2, tiny.LENGTH)) == [0]
    tied = config(num_nextn_predict_layers=0, tie_word_embeddings=True)
    assert holders_of_embedding(tied, divide(tied, "1f1b", 2, tiny.LENGTH)) == [0, 1]


def test_a_heavy_head_takes_the_place_of_layers() -> None:
    """The head and two MTP modules with it weigh more than the layers of this model."""
    first, last = divide(config(vocab_size=997), "1f1b", 2, tiny.LENGTH)
    assert len(first[0].layers) > len(last[0].layers)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_names_stay_those_of_the_whole_model(schedule: Schedule) -> None:
    whole = tiny.model(config()).state_dict()
    found = set()
    division = divide(config(), schedule, 3, tiny.LENGTH)
    for stages in division:
        own = tiny.model(config())
        keep_stages(own, stages)
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, whole[name])
            assert name not in found or name == "embed_tokens.weight"
            found.add(name)
    assert found == whole.keys()


def modules_of(
    model: Transformer, division: Sequence[Sequence[PipelineStage]], *, defers: bool = False
) -> list[StageModule]:
    """All stages in order, in this one process."""
    modules = [
        StageModule(model, stage, torch.float64, defers=defers) for own in division for stage in own
    ]
    return sorted(modules, key=lambda module: module.stage.index)


def run_stages(modules: Sequence[StageModule], batch: Batch, inputs: StageInputs) -> None:
    """Forward through all stages, then backward stage by stage."""
    length = batch.sequence_length(len(inputs.targets))
    x = batch.tokens[:, :length].flatten()
    links: list[tuple[Tensor, Tensor]] = []
    for module in modules:
        module.begin(inputs)
        out = module(x, torch.zeros(1, dtype=torch.int64))
        links.append((x, out))
        x = out.detach().requires_grad_()
    gradient = None
    for module, (given, out) in zip(reversed(modules), reversed(links), strict=True):
        out.backward(gradient)
        gradient = given.grad
        module.deferred_work()()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("defers", "recompute"), [(False, False), (True, False), (True, True)])
def test_stages_compute_what_the_model_computes(defers: bool, recompute: bool, tied: bool) -> None:
    """Two MTP modules embed with the matrix that is the head too, at three depths of one stage:
    what PyTorch's own split of the backward pass cannot take apart.
    """
    small = config(tie_word_embeddings=tied)
    batch = tiny.batch(masked=True)
    targets = count_targets(batch, 3)
    weights = {"mtp_weight": 0.3, "z_weight": 0.01}
    expected = tiny.model(small)
    view = local_batch(ProcessMesh(), batch, 3)
    loss = batch_loss(expected, *view, targets=targets, dtype=torch.float64, **weights)
    loss.total.backward()
    found = tiny.model(small)
    if recompute:
        checkpoint_activations(found)
    modules = modules_of(found, divide(small, "dualpipev", 2, tiny.LENGTH), defers=defers)
    run_stages(modules, batch, StageInputs(micro_batches=[view], targets=targets, **weights))
    torch.testing.assert_close(modules[-1].sums[:-1], loss.heads.double())
    torch.testing.assert_close(modules[-1].sums[-1], loss.z.double())
    gradients = tiny.gradients(found)
    assert gradients.keys() == tiny.gradients(expected).keys()
    for name, gradient in tiny.gradients(expected).items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_large_matrices_wait() -> None:
    small = config()
    model = tiny.model(small)
    stage = PipelineStage(index=0, layers=(0, 1), is_first=True, is_last=False)

    (module,) = modules_of(model, [[stage]], defers=True)
    batch = tiny.batch()
    module.begin(
        StageInputs(
            micro_batches=[local_batch(ProcessMesh(), batch, 3)],
            targets=[1, 1, 1],
            mtp_weight=0.0,
            z_weight=0.0,
        )
    )
    ids = batch.tokens[:, : tiny.LENGTH].flatten()
    module(ids, torch.zeros(1, dtype=torch.int64)).square().sum().backward()
    waiting = {name for name, p in module.named_parameters() if p.requires_grad and p.grad is None}
    layers = ("layers.0", "layers.1")
    assert {f"{layer}.self_attn.o_proj.weight" for layer in layers} <= waiting
    assert {"layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"} <= waiting
    assert not any("norm" in name or "gate.weight" in name for name in waiting)
    module.deferred_work()()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
