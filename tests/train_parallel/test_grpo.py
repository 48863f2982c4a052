"""GRPO by data parallelism: two processes sample, score, learn and log what one process does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.ops import native
from lowlat.train.recipe.toml import to_toml
from tests.train_parallel.processes import run
from tests.train_parallel.runs import PROGRAM, state
from tests.unit.train import tuning
from tests.unit.train.policy import test_grpo as grpo

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

TIMES = ("rollout_tokens_per_second", "update_tokens_per_second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("grpo")
    tuning.checkpoint(made / "base", tuning.config(), torch.bfloat16)
    # Dynamic sampling replaces groups that have no reward; others come from another process.
    grpo.write_prompts(made / "prompts.jsonl", ["\u0000", "a", "\u0000", "P", "z"])
    (made / "reward.py").write_text(grpo.REWARD)
    return made


def train(folder: Path, raw: dict[str, Any], name: str, processes: int) -> Path:
    path = folder / "recipe.toml"
    raw = raw | {"base_model": str(folder / "base"), "parallel": {"data": processes}}
    path.write_text(to_toml(raw))
    run(processes, [*PROGRAM, "train", str(path), "--quiet", "--out", str(folder / name)])
    return folder / name


def records(path: Path) -> list[dict[str, Any]]:
    """What is logged of rollouts and experts, without times."""
    lines = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    steps = {line["step"]: line for line in lines if line["kind"] == "step"}
    return [
        {key: value for key, value in step["rollouts"].items() if key not in TIMES}
        | {key: step[key] for key in ("grad_norm", "mtp_losses", "sequence_loss", "batch_tokens")}
        # The first step of a run has the loads of all experts.
        | {"experts": [own | {"load": []} for own in step["experts"]]}
        for step in steps.values()
    ]


def samples(path: Path) -> list[str]:
    return [file.read_text() for file in sorted((path / "samples").iterdir())]


def assert_same(one: Path, other: Path) -> None:
    tuning.assert_same(state(one), state(other))
    assert records(one) == records(other)
    assert samples(one) == samples(other)


@pytest.mark.slow
def test_two_processes_learn_the_bits_of_one(folder: Path) -> None:
    """With a micro-batch per process, whose gradients have one order; also after a resumption
    between two updates over the same completions.
    """
    raw = grpo.raw_recipe(grpo.FULL | {"dynamic_sampling": True}, balance={"sequence_weight": 1e-2})
    raw["phase"][0] |= {"mtp_weight": 0.3}
    raw["evaluation"] = {"prompts": "prompts.jsonl", "num_generations": 2, "pass_at": [1, 2]}
    raw["evaluation"] |= {"every_steps": 2}
    one = train(folder, raw, "one", 1)
    two = train(folder, raw, "two", 2)
    assert_same(one, two)
    assert len(records(one)) == 4
    assert any(record["no_signal"] > 0 for record in records(one))
    # As killed before the save of the second step.
    for save in sorted((two / "saves").glob("step-*"))[1:]:
        shutil.rmtree(save)
    shutil.rmtree(two / "model")
    assert_same(one, train(folder, raw, "two", 2))
