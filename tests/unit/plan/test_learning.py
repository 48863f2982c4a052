"""FLOPs and bytes of weights that stay and of a teacher."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.ops import native_training_kernels
from lowlat.plan.activations import layer_bytes
from lowlat.plan.flops import token_flops
from lowlat.train.cost.dry_run import dry_run, require_fit
from lowlat.train.cost.frozen_weights import HELD_IN_FP32, INPUTS_OF_MLPS, training_flops
from lowlat.train.layers.fused import use_fused_layers
from lowlat.train.recipe.schema import Recipe, parse_recipe
from lowlat.train.step.trainable import freeze_all_but_attention
from lowlat.utils.errors import UserError
from tests.fakes import gqa_config, mla_config
from tests.lowlat_configs import random_model

from .test_memory import DENSE, JOB, kept_bytes

LENGTH = 16
STUDENT = mla_config(num_nextn_predict_layers=0)
TEACHER = gqa_config()


def recipe(match: str = "logits", **changes: Any) -> Recipe:
    phase = {
        "name": "p",
        "steps": 3,
        "sequence_length": LENGTH,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "match": match,
    }
    raw: dict[str, Any] = {
        "name": "r",
        "base_model": "s",
        "data": {"folder": "d"},
        "phase": [phase],
    }
    taught = {"distillation": {"teacher": "t"}, "trainable": "attention"}
    return parse_recipe(raw | taught | changes, origin="r.toml")


def flops(own: Recipe, teacher: ModelConfig | None = TEACHER) -> float:
    return training_flops(STUDENT, own, own.phase[0], teacher)


def test_flops_by_hand() -> None:
    """A product whose weight stays has two FLOPs of three; a teacher one of its own."""
    parts, taught = (token_flops(config, LENGTH).parts for config in (STUDENT, TEACHER))
    attention, head = parts["attention"] + parts["scores"], parts["head"]
    mlp, layers = parts["dense MLP"], sum(taught.values()) - taught["head"]
    assert flops(recipe()) == 3 * attention + 2 * (mlp + head) + sum(taught.values())
    assert flops(recipe("attention")) == 3 * attention + layers
    assert flops(recipe("layers")) == 3 * attention + 2 * mlp + layers
    everything = recipe(trainable="all")
    assert flops(everything) == 3 * sum(parts.values()) + sum(taught.values())
    assert flops(everything, None) == token_flops(STUDENT, LENGTH).training
    updates = recipe(trainable="all", lora={"rank": 2, "alpha": 2.0})
    assert flops(updates, None) == 2 * sum(parts.values())


def test_dry_run_counts_all_of_it() -> None:
    own = recipe()
    found = dry_run(STUDENT, own, rate=1e9, memory_bytes=10**9, teacher=TEACHER)
    assert found.trained_flops == [flops(own)]
    assert found.total_flops == found.tokens * flops(own)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_memory_by_hand(precision: str, size: int) -> None:
    """Gradients and moments of attention alone, the teacher's weights in the type of products."""
    plain = recipe(precision=precision, trainable="all")
    full = require_fit(STUDENT, plain, memory_bytes=2**40)
    ours = require_fit(STUDENT, recipe(precision=precision), memory_bytes=2**40, teacher=TEACHER)
    attention = count_parameters(STUDENT).attention
    assert ours.parts["gradients"] == 4 * attention < full.parts["gradients"]
    assert ours.parts["optimizer"] == 8 * attention < full.parts["optimizer"]
    stays = full.parts["weights"] / 4 - sum(ours.parameters[p] for p in HELD_IN_FP32)
    assert ours.parts["weights"] == full.parts["weights"] - (4 - size) * stays
    assert ours.parts["cast weights"] == (4 - size) * attention <= full.parts["cast weights"]
    head = 4 * STUDENT.vocab_size * STUDENT.hidden_size
    assert ours.parts["loss"] == full.parts["loss"] - head
    weights = size * count_parameters(TEACHER).total
    assert weights < ours.parts["teacher"] < weights + 32 * 40 * size * TEACHER.hidden_size
    assert ours.parts["activations"] == sum(ours.activations.values())
    assert {*full.activations} - {*ours.activations} == {"MLP norm", "MLP SwiGLU"}


def test_what_frozen_mlps_do_not_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps less where MLPs stay is what is left out of the estimate."""
    monkeypatch.setattr(native_training_kernels, "usable", lambda *tensors: False)
    hidden = torch.randn(4 * 128, DENSE.hidden_size, requires_grad=True)
    model = random_model(DENSE, torch.float32).requires_grad_(True)
    use_fused_layers(model)
    full = kept_bytes(model, hidden, [128] * 4)
    freeze_all_but_attention(model)
    kept = layer_bytes(DENSE, 0, JOB)
    saved = DENSE.num_hidden_layers * len(hidden) * sum(kept[name] for name in INPUTS_OF_MLPS[:2])
    assert full - kept_bytes(model, hidden, [128] * 4) == saved


def test_a_teacher_that_cannot_fit_is_reported() -> None:
    large = replace(TEACHER, hidden_size=23 * 256, intermediate_size=31 * 256)
    with pytest.raises(UserError, match=r"the largest part is .* of teacher: use a smaller"):
        require_fit(STUDENT, recipe(), memory_bytes=2**29, teacher=large)
