"""Small models and batches of prime sizes for the trainer's tests."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowlat.config.model import ModelConfig
from lowlat.data.batch import Batch
from lowlat.model.transformer import Transformer
from lowlat.train.inputs.run_inputs import RunInputs
from lowlat.train.layers.fused import use_fused_layers
from lowlat.train.layers.stacked_experts import stack_experts
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.parallel.parallelize import ShardedParameter, ShardedParameters
from lowlat.train.parallel.sharding import Sharding
from lowlat.train.recipe.schedule import StepPlan, TrainingSchedule
from lowlat.train.recipe.schema import Recipe, parse_recipe
from tests.configs import MOE
from tests.fakes import mla_config
from tests.lowlat_configs import random_model

LENGTH = 7
ROWS = 5
VOCAB = 29


def inputs(*fingerprints: str) -> RunInputs:
    """Inputs of a run that are known by their fingerprints alone."""
    return RunInputs(
        configs=[],
        data=[],
        grpo=[],
        base_model=None,
        teacher=None,
        teacher_config=None,
        fingerprints=list(fingerprints),
        teacher_fingerprint=None,
    )


def unsharded(model: nn.Module) -> ShardedParameters:
    """All parameters of a model in one process, as they are."""
    mesh = ProcessMesh()
    parameters = [
        ShardedParameter(
            name=name,
            parameter=parameter,
            local=parameter,
            sharding=Sharding(mesh, parameter.shape),
            reduce_axes=(),
        )
        for name, parameter in model.named_parameters()
    ]
    return ShardedParameters(mesh, parameters)


def config(**changes: Any) -> ModelConfig:
    """A dense layer and one of experts in two groups, and two MTP modules."""
    moe = replace(MOE, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=1, n_group=2)
    base = replace(mla_config(), hidden_size=11, intermediate_size=13, vocab_size=VOCAB, moe=moe)
    return replace(base, **changes)


def model(model_config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    """Every parameter random, biases of routing too; experts stacked, ready to be trained."""
    result = random_model(model_config, dtype)
    stack_experts(result)
    use_fused_layers(result)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(not name.endswith("e_score_correction_bias"))
    return result


def batch(*, ahead: int = 3, rows: int = ROWS, length: int = LENGTH, masked: bool = False) -> Batch:
    """Random tokens; `masked`: documents that are blind to each other, whose first tokens nobody
    predicts, and some more tokens that do not count.
    """
    tokens = torch.randint(VOCAB, (rows, length + ahead), generator=_generator())
    loss_mask = torch.ones_like(tokens, dtype=torch.bool)
    if not masked:
        return Batch(tokens=tokens, loss_mask=loss_mask)
    documents = []
    for row in range(rows):
        first = 1 + row % (length - 1)
        loss_mask[row, 0] = loss_mask[row, first] = False
        documents.append((first, length - first))
    loss_mask[1, 2] = loss_mask[-1, length] = False
    return Batch(tokens=tokens, loss_mask=loss_mask, documents=tuple(documents))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def recipe(**phase: Any) -> Recipe:
    """Of one phase that `phase` changes; its batch is ROWS, filled up to whole micro-batches."""
    unit = phase.get("micro_batch_size", 1)
    fields = {
        "name": "p",
        "steps": 4,
        "sequence_length": LENGTH,
        "batch_size": -(-ROWS // unit) * unit,
        "micro_batch_size": 1,
        "learning_rate": 1e-2,
    }
    raw = {"name": "t", "model": {}, "data": {"folder": "none"}, "phase": [fields | phase]}
    return parse_recipe(raw, origin="test")


def plan(step: int = 0, **phase: Any) -> StepPlan:
    return TrainingSchedule(recipe(**phase)).at(step)


def gradients(trained: Transformer) -> dict[str, Tensor]:
    return {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
