"""Memory and time of GRPO phases; memory is compared with the tensors that a run makes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lowlat.attention.cache import PAGE_SIZE, PagedCache
from lowlat.cli.main import app
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.engine.scheduler import MAX_SEQUENCES
from lowlat.model.native import KeptActivations
from lowlat.ops import native
from lowlat.plan.flops import token_flops
from lowlat.plan.memory import MemoryEstimate
from lowlat.train.cost.dry_run import require_fit
from lowlat.train.cost.frozen_weights import training_flops
from lowlat.train.cost.rollout_memory import REFERENCE, ROLLOUT_CACHE, ROLLOUT_WEIGHTS
from lowlat.train.policy.forward import PolicySequence
from lowlat.train.policy.learner import PolicyBatch
from lowlat.train.policy.mtp import MTPFigures, MTPTraining
from lowlat.train.policy.weights import PolicyWeights
from lowlat.train.recipe.schema import Recipe, parse_recipe
from lowlat.train.recipe.toml import to_toml
from lowlat.train.step.lora import add_lora
from lowlat.utils.errors import UserError
from tests.lowlat_configs import random_model
from tests.unit.train import tuning
from tests.unit.train.policy.models import CONFIGS, learner, masters

CONFIG = replace(CONFIGS["mla-moe-mtp"], num_nextn_predict_layers=0)
LENGTH, COMPLETION = 29, 11


def recipe(grpo: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    table = {
        "prompts": "p.jsonl",
        "reward_funcs": ["length_penalty"],
        "num_generations": 3,
        "max_completion_length": COMPLETION,
    }
    phase = {
        "name": "rl",
        "steps": 3,
        "sequence_length": LENGTH,
        "batch_size": 6,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "grpo": table | (grpo or {}),
    }
    raw = {"name": "r", "base_model": "b", "balance": {"sequence_weight": 0.0}, "phase": [phase]}
    return parse_recipe(raw | changes, origin="r.toml")


def estimate(own: Recipe, config: ModelConfig = CONFIG) -> MemoryEstimate:
    return require_fit(config, own, memory_bytes=2**40)


def size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_activations_are_those_of_the_kernels() -> None:
    """Of a micro-batch, and once more of its completions, which are one call."""
    kept = [KeptActivations.empty(CONFIG, 2 * length) for length in (LENGTH, COMPLETION)]
    assert estimate(recipe()).parts["activations"] == sum(map(size, kept))


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
def test_activations_of_mtp_modules_are_what_autograd_keeps() -> None:
    config = replace(CONFIG, num_nextn_predict_layers=2)
    policy = learner(masters(config))
    tensors = policy.weights.tensors.values()
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def run(*given: Any) -> MTPFigures:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return MTPTraining.run(policy._mtp, *given)

    policy._mtp.run = run
    prompt, completion = list(range(LENGTH - COMPLETION)), list(range(COMPLETION))
    batch = PolicyBatch(
        sequences=[PolicySequence(prompt=prompt, completion=completion)] * 2,
        advantages=[1.0, -1.0],
        is_counted=[True, True],
    )
    policy.accumulate(batch, 2, 0.3)
    own = recipe()
    phase = own.phase[0].model_copy(update={"mtp_weight": 0.0})
    frozen = own.model_copy(update={"phase": [phase]})
    found, without = (estimate(each, config).parts["activations"] for each in (own, frozen))
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # Positions and tables are no activations.
    assert found - without == pytest.approx(size, rel=0.15)


def test_rollouts_have_weights_of_their_own() -> None:
    """All are rounded from masters; with LoRA those with an update, the others are shared."""
    parts = estimate(recipe()).parts
    rounded = PolicyWeights(masters(CONFIG))
    assert parts[ROLLOUT_WEIGHTS] == pytest.approx(size(rounded.tensors.values()), rel=0.02)
    assert "cast weights" not in parts and parts["gradients"] > 0
    lora = {"rank": 2, "alpha": 4.0, "target_modules": ["q_b_proj", "down_proj"]}
    own = recipe(lora=lora)
    assert own.lora is not None
    model = random_model(CONFIG, torch.bfloat16)
    add_lora(model, own.lora, seed=0)
    weights = PolicyWeights(model, own.lora)
    copies = size(weights.tensors[name] for name in weights._rounded if "bias" not in name)
    assert estimate(own).parts[ROLLOUT_WEIGHTS] == copies


@pytest.mark.parametrize(
    ("batch", "data", "evaluation", "running", "groups"),
    [
        (6, 1, {}, 6, 2),
        (300, 1, {}, MAX_SEQUENCES, 43),
        (30, 3, {}, 12, 4),
        (6, 1, {"prompts": "h.jsonl", "num_generations": 2}, MAX_SEQUENCES, 64),
    ],
)
def test_cache_of_completions_that_run_at_once(
    batch: int, data: int, evaluation: dict[str, Any], running: int, groups: int
) -> None:
    own = recipe(evaluation=evaluation, parallel={"data": data})
    phase = own.phase[0].model_copy(update={"batch_size": float(batch)})
    own = own.model_copy(update={"phase": [phase]})
    cache = PagedCache(CONFIG, num_pages=1, dtype=torch.bfloat16)
    tokens = running * (COMPLETION + PAGE_SIZE) + groups * (LENGTH - COMPLETION)
    assert estimate(own).parts[ROLLOUT_CACHE] == tokens * cache.page_bytes / PAGE_SIZE


def test_a_reference_is_a_copy_in_bf16() -> None:
    parts = estimate(recipe({"beta": 0.1})).parts
    assert parts[REFERENCE] == 2 * count_parameters(CONFIG).total
    assert REFERENCE not in estimate(recipe()).parts


def test_a_run_that_cannot_fit_is_refused() -> None:
    phase = recipe().phase[0].model_dump() | {
        "sequence_length": 110_000,
        "batch_size": 120.0,
        "micro_batch_size": 1,
    }
    phase["grpo"] |= {"max_completion_length": 100_000}
    with pytest.raises(UserError, match=r"KV cache of rollouts: lower grpo\.max_completion_length"):
        require_fit(CONFIG, recipe(phase=[phase]), memory_bytes=2**29)


def test_sampling_is_a_forward_pass_more() -> None:
    own = recipe()
    text = own.phase[0].model_copy(update={"grpo": None})
    forward = token_flops(CONFIG, LENGTH).forward
    found, without = (training_flops(CONFIG, own, each, None) for each in (own.phase[0], text))
    assert found - without == pytest.approx(forward)


def test_plan_train_prints_the_dry_run(tmp_path: Path) -> None:
    tuning.checkpoint(tmp_path / "base", tuning.config(), torch.bfloat16)
    raw = recipe().model_dump(exclude_none=True, exclude_defaults=True) | {"base_model": "base"}
    path = tmp_path / "r.toml"
    path.write_text(to_toml(raw))
    done = CliRunner().invoke(app, ["plan", "train", str(path), "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["steps"] == 3 and 0 < found["seconds"]["least"] < found["seconds"]["most"]
    parts = found["memory"]["by_purpose"]
    assert parts[ROLLOUT_CACHE] > 0 and parts[ROLLOUT_WEIGHTS] > 0
    assert found["memory"]["total"] > sum(parts.values())
    table = CliRunner().invoke(app, ["plan", "train", str(path)], catch_exceptions=False)
    assert ROLLOUT_CACHE in table.stdout
    refused = CliRunner().invoke(app, ["plan", "train", str(path), "--devices", "4"])
    assert str(refused.exception) == (
        f"{path}: grpo runs on the CPU of this machine; leave out --devices"
    )
