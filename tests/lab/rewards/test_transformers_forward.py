"""transformers' forward pass in place of the engine's kernels: the same function, other bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowlat_lab.rewards.transformers_forward import TransformersForward
from torch import Tensor

from lowlat.checkpoint.save import save_model
from lowlat.config.model import ModelConfig
from lowlat.ops import native
from lowlat.train.policy.forward import PolicyForward, PolicySequence
from lowlat.train.policy.learner import PolicyBatch
from tests.unit.train.policy.models import CONFIGS, learner, masters

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)
pytest.importorskip("transformers")

SEQUENCES = [
    PolicySequence(
        prompt=[(i * 37 + k) % 256 for i in range(3 + 17 * k)],
        completion=[3 + (i * 29 + 5 * k) % 240 for i in range(1 + 11 * k)],
    )
    for k in range(3)
]


CASES = {
    "mla-moe-mtp": CONFIGS["mla-moe-mtp"],
    # transformers divides the hidden size among the heads
    "gqa": replace(CONFIGS["gqa"], hidden_size=24),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelConfig, Path]:
    """A config, and a folder of a model with it."""
    config = CASES[request.param]
    save_model(learner(masters(config)).model, config, tmp_path / "model", source=None)
    return config, tmp_path / "model"


def test_logits_and_residuals_are_nearly_the_engines(case: tuple[ModelConfig, Path]) -> None:
    config, folder = case
    own = learner(masters(config))
    engine, theirs = PolicyForward(own.model), TransformersForward(folder, own)
    expected, found = engine.run(SEQUENCES), theirs.run(SEQUENCES)
    assert found.kept is not None and expected.kept is not None
    assert torch.equal(found.targets, expected.targets) and torch.equal(found.ids, expected.ids)
    assert distance(found.kept.residuals, expected.kept.residuals) < 0.02
    logits = [each.logits(run, slice(None)) for each, run in ((engine, expected), (theirs, found))]
    assert 0 < distance(logits[1], logits[0]) < 0.02
    means = theirs.mismatch.means()
    assert means["difference"] is not None and 0 < means["difference"] < 0.2
    assert (means["rerouted"] is None) == (config.moe is None)


def test_gradients_are_nearly_the_engines(case: tuple[ModelConfig, Path]) -> None:
    """Of weights that change after transformers' model is made."""
    config, folder = case
    found = []
    for uses_transformers in (False, True):
        trained = masters(config)
        own = learner(trained)
        if uses_transformers:
            own.forward = TransformersForward(folder, own)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.mul_(1.05)
        own.refresh()
        batch = PolicyBatch(sequences=SEQUENCES, advantages=[0.7, -1.2, 0.4], is_counted=[True] * 3)
        own.accumulate(batch, 3)
        found.append({n: p.grad for n, p in trained.named_parameters() if p.grad is not None})
    for name, expected in found[0].items():
        assert distance(found[1][name], expected) < 0.15, name


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
