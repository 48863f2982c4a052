"""Sizes that fit one another, and what a mesh of one does."""

import pytest
import torch

from lowlat.train.inputs.parallel_check import check_parallel
from lowlat.train.parallel.launch import process_mesh
from lowlat.train.parallel.mesh import TOKEN_AXES, ProcessMesh, view_sizes
from lowlat.train.recipe.schedule import TrainingSchedule
from lowlat.train.recipe.schema import ParallelConfig, Recipe, parse_recipe
from lowlat.train.run.state import check_resumable
from lowlat.utils.errors import UserError
from tests.fakes import gqa_config, mla_config
from tests.train_parallel.training import model_config
from tests.unit.train import tiny


def recipe(length: int = 16, precision: str = "fp32", **parallel: int) -> Recipe:
    phase = {
        "name": "only",
        "steps": 3,
        "sequence_length": length,
        "batch_size": 8,
        "micro_batch_size": 1,
        "learning_rate": 0.1,
    }
    raw = {
        "name": "r",
        "model": {},
        "data": {"folder": "f"},
        "precision": precision,
        "parallel": parallel,
        "phase": [phase],
    }
    return parse_recipe(raw, origin="r.toml")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": 6, "expert": 3}, (1, 2)),
        ({"fsdp": 6, "expert": 3}, (2, 1)),
        ({"data": 5, "fsdp": 6, "expert": 3}, (2, 5)),
        ({"data": 5, "fsdp": 3, "expert": 15}, (1, 1)),
        ({"data": 3, "context": 2, "fsdp": 2, "expert": 4}, (1, 3)),
        ({"data": 3, "fsdp": 2}, (2, 3)),
    ],
)
def test_experts_use_the_processes_of_data_fsdp_and_context(
    sizes: dict[str, int], expected: tuple[int, int]
) -> None:
    parallel = ParallelConfig.model_validate(sizes | {"tensor": 2})
    view = view_sizes(parallel)[-1]
    assert (view["expert_fsdp"], view["expert_replicate"]) == expected
    product = 1
    for size in view.values():
        product *= size
    assert product == parallel.processes


@pytest.mark.parametrize("sizes", [{"fsdp": 6, "expert": 4}, {"data": 3, "fsdp": 2, "expert": 4}])
def test_experts_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"parallel.expert 4 does not fit"):
        view_sizes(ParallelConfig.model_validate(sizes))


def test_a_mesh_of_one_process_changes_nothing() -> None:
    mesh = ProcessMesh()
    x = torch.arange(3.0)
    assert mesh.sum(x, TOKEN_AXES) is x
    assert mesh.any(True) and not mesh.any(False)
    assert mesh.broadcast(7) == 7
    assert mesh.is_main_process
    assert (mesh.data_parallel_size, mesh.data_parallel_rank) == (1, 0)
    assert mesh.local_rank("expert") == 0
    assert mesh.batch_shard(11, 5) == (11, 5)
    mesh.barrier()


def test_a_process_alone_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_mesh(ParallelConfig()) as mesh:
        assert mesh.world_size == 1
    with pytest.raises(UserError, match=r"r.toml: \[parallel\] is for 6 processes, 1 started"):
        with process_mesh(ParallelConfig(fsdp=2, tensor=3), origin="r.toml"):
            pass


def test_only_the_first_says_that_processes_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), process_mesh(ParallelConfig(tensor=3)):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor": 3}, "tensor 3 does not divide num_attention_heads 4"),
        ({"tensor": 2, "precision": "fp8"}, "precision fp8 does not support parallel.tensor 2"),
        ({"expert": 3}, "expert 3 does not divide n_routed_experts 8"),
        ({"expert": 2}, r"r\.toml: parallel\.expert 2 does not fit fsdp 1 and data x context 1"),
        ({"context": 3}, "phase only: sequence_length 16 is not a multiple of 6"),
    ],
)
def test_models_that_cannot_be_divided(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_parallel(model_config("mla"), recipe(**options), "r.toml")


def test_models_that_can_be_divided() -> None:
    check_parallel(model_config("gqa"), recipe(data=2, tensor=4, expert=8, context=4), "r.toml")
    check_parallel(mla_config(), recipe(), "r.toml")


def test_experts_need_experts() -> None:
    with pytest.raises(UserError, match="expert 2 does not divide n_routed_experts 0"):
        check_parallel(gqa_config(), recipe(expert=2), "r.toml")


def test_a_run_does_not_resume_with_batches_of_another_size() -> None:
    """Rows are rounded to whole micro-batches of every process: what a run read before must be what
    the layout it goes on in would have read.
    """
    known = recipe()
    saved = {
        "recipe": known.model_dump(mode="json"),
        "data": ["f"],
        "step": 2,
        "seconds": 1.0,
        "tokens": TrainingSchedule(known).tokens_before(2),
    }
    inputs = tiny.inputs("f")
    assert check_resumable(saved, known, inputs, TrainingSchedule(known, ranks=4), "run").step == 2
    with pytest.raises(UserError, match=r"trained on 256 tokens in 2 steps"):
        check_resumable(saved, known, inputs, TrainingSchedule(known, ranks=3), "run")
