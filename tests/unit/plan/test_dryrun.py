"""From recipe to figures, and the refusal of what cannot fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.config.parameter_count import count_parameters
from lowlat.plan.flops import token_flops
from lowlat.plan.job import check
from lowlat.train.cost.dry_run import (
    REACHED,
    dry_run,
    job_of,
    largest_job,
    needed_bytes,
    require_fit,
    usable_memory,
)
from lowlat.train.inputs.configs import recipe_config
from lowlat.train.inputs.parallel_check import check_parallel
from lowlat.train.recipe.schema import Recipe, parse_recipe
from lowlat.utils.errors import UserError
from lowlat.utils.memory import memory_limit

MODEL = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 131,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 263,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
}
PHASE = {
    "name": "first",
    "steps": 7,
    "sequence_length": 64,
    "batch_size": [{"to": 12.0, "steps": 3}, {"to": 12.0}],
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
}


def recipe(**changes: Any) -> Recipe:
    raw: dict[str, Any] = {"name": "r", "model": MODEL, "data": {"folder": "d"}, "phase": [PHASE]}
    return parse_recipe(raw | {"precision": "fp32"} | changes, origin="r.toml")


def config(own: Recipe):
    return recipe_config(own, Path("r.toml"), None)


def test_figures_of_two_phases():
    own = recipe(phase=[PHASE, PHASE | {"name": "long", "sequence_length": 128, "steps": 5}])
    found = dry_run(config(own), own, rate=1e9, memory_bytes=10**9)
    rows = [4, 8, 12, 12, 12, 12, 12]
    assert found.steps == 12
    assert found.tokens == sum(rows) * 64 + sum(rows[:5]) * 128
    flops = [token_flops(config(own), length).training for length in (64, 128)]
    assert found.total_flops == pytest.approx(
        sum(rows) * 64 * flops[0] + sum(rows[:5]) * 128 * flops[1]
    )
    assert found.parameters == count_parameters(config(own)).total
    least, most = found.seconds
    assert least == pytest.approx(found.total_flops / 1e9 / REACHED[1])
    assert least < most
    # The longer rows need more memory.
    assert found.memory.parts["activations"] == pytest.approx(2 * _activations(recipe()))


def _activations(own: Recipe) -> float:
    found = dry_run(config(own), own, rate=1e9, memory_bytes=10**9)
    return found.memory.parts["activations"]


def test_recipes_become_jobs():
    parallel = {"data": 2, "fsdp": 3, "tensor": 2, "pipeline": 2, "pipeline_schedule": "zb"}
    own = recipe(parallel=parallel, activation_checkpointing="full", optimizer={"name": "muon"})
    job = job_of(own, own.phase[0])
    layout = job.layout
    assert (layout.data, layout.fsdp, layout.tensor, layout.pipeline) == (2, 3, 2, 2)
    assert (layout.schedule, layout.zero) == ("zb1p", 2)
    assert (job.activation_checkpointing, job.optimizer, job.precision) == ("full", "muon", "fp32")
    assert layout.devices == own.parallel.processes
    assert largest_job(own).batch_size == 12
    assert job_of(recipe(parallel={"fsdp": 3}), own.phase[0]).layout.zero == 3
    assert job_of(recipe(), own.phase[0]).layout.zero == 0


def test_what_fits_is_let_through():
    own = recipe()
    assert require_fit(config(own), own, memory_bytes=2**30).total < 2**29


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"phase": [PHASE | {"sequence_length": 512, "micro_batch_size": 4000}]},
            r"phase 'first' needs about .* GB of memory per process and 1\.1 GB are available; the "
            r"largest part is .* GB of activations: lower micro_batch_size \(4000\)",
        ),
        (
            {"phase": [PHASE | {"sequence_length": 512000, "micro_batch_size": 1}]},
            r"of activations: set activation_checkpointing = 'full'",
        ),
        (
            {"model": MODEL | {"intermediate_size": 3_000_000}},
            r"of checkpoint copy: use a smaller model or optimizer\.name = 'muon'; "
            "checkpoints are written from a copy",
        ),
        (
            {"model": MODEL | {"intermediate_size": 3_000_000}, "optimizer": {"name": "muon"}},
            r"of checkpoint copy: use a smaller model; checkpoints are written from a copy",
        ),
    ],
)
def test_what_does_not_fit_names_the_largest_part_and_the_remedy(
    changes: dict[str, Any], message: str
):
    own = recipe(**changes)
    with pytest.raises(UserError, match=message) as caught:
        require_fit(config(own), own, memory_bytes=2**30)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("optimizer", "size"), [("adamw", 12), ("muon", None)])
def test_the_copy_that_is_saved_is_counted(optimizer: str, size: int | None):
    """Regression: a training that fits until its first save."""
    own = recipe(optimizer={"name": optimizer})
    parts = require_fit(config(own), own, memory_bytes=2**40).parts
    assert parts["checkpoint copy"] == parts["weights"] + parts["optimizer"]
    if size is not None:
        assert parts["checkpoint copy"] == size * count_parameters(config(own)).total
    there = needed_bytes(require_fit(config(own), own, memory_bytes=2**40))
    with pytest.raises(UserError, match="needs about"):
        require_fit(config(own), own, memory_bytes=int(there - parts["checkpoint copy"] / 2))


def test_copies_of_the_state_in_several_processes(monkeypatch: pytest.MonkeyPatch):
    """One of those that share a machine holds what is saved, and leaves it the others' room; all of
    them hold the whole state while one phase follows another.
    """
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = require_fit(config(recipe()), recipe(), memory_bytes=2**40).parts["checkpoint copy"]
    own = recipe(parallel={"fsdp": 4})
    parts = require_fit(config(own), own, memory_bytes=2**40).parts
    assert parts["checkpoint copy"] == whole / 4 and "change of phase" not in parts
    own = recipe(parallel={"fsdp": 4}, phase=[PHASE, PHASE])
    parts = require_fit(config(own), own, memory_bytes=2**40).parts
    step = sum(parts[part] for part in ("gradients", "cast weights", "activations", "loss"))
    step += parts["working memory"]
    assert parts["change of phase"] == max(0.0, whole - step)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert require_fit(config(own), own, memory_bytes=2**40).parts["checkpoint copy"] == whole / 2


def test_copies_of_the_state_of_gpus_are_in_the_host():
    own = recipe(device="cuda")
    assert "checkpoint copy" not in require_fit(config(own), own, memory_bytes=2**40).parts


def test_rows_need_not_divide_by_the_tensor_processes():
    """Regression: a run refused by a rule of layouts that divide norms by sequence."""
    model = MODEL | {"num_key_value_heads": 6, "intermediate_size": 132}
    own = recipe(model=model, parallel={"tensor": 3}, phase=[PHASE | {"sequence_length": 127}])
    check_parallel(config(own), own, "r.toml")
    assert require_fit(config(own), own, memory_bytes=2**30).total > 0
    assert dry_run(config(own), own, rate=1e9, memory_bytes=10**9).processes == 3
    check(config(own), largest_job(own))


def test_the_largest_batch_is_counted():
    """Regression: a batch that no memory holds, which ends a run in its first step."""
    own = recipe(phase=[PHASE | {"batch_size": [{"to": 1e9, "steps": 3}, {"to": 4.0}]}])
    said = r"r\.toml: phase 'first' needs about .* of batch: lower batch_size"
    with pytest.raises(UserError, match=said):
        require_fit(config(own), own, memory_bytes=2**36, origin="r.toml")
    own = recipe(parallel={"data": 2})
    parts = require_fit(config(own), own, memory_bytes=2**30).parts
    assert parts["batch"] == 9 * 12 // 2 * 65


def test_processes_share_the_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch):
    """Those of other nodes have that of theirs."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert usable_memory(torch.device("cpu"), 4) == memory_limit() // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert usable_memory(torch.device("cpu"), 4) == memory_limit() // 2
