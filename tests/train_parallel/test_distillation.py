"""Learning from a teacher in two processes: batches divided, weights divided, as in one."""

from pathlib import Path

import pytest
import torch

from lowlat.train.recipe.toml import to_toml
from tests.train_parallel.processes import run
from tests.train_parallel.runs import PROGRAM, state
from tests.unit.train import recovering, tuning

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer by layer, then distributions."""
    folder = tmp_path_factory.mktemp("recipe")
    recovering.models(folder)
    layers = {"match": "attention", "steps": 2, "learning_rate": 1e-3}
    raw = recovering.raw(layers, {"name": "more", "steps": 3, "learning_rate": 1e-3})
    # Rounding decides about weights whose gradient is next to nothing, unless eps is above it.
    raw["optimizer"] = {"weight_decay": 0.0, "eps": 1e-4}
    (folder / "recipe.toml").write_text(to_toml(raw))
    return folder / "recipe.toml"


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_two_processes_learn_what_one_learns(recipe: Path, tmp_path: Path, axis: str) -> None:
    """Checkpoints of both are alike, frozen weights to the bit; FSDP2 divides no layer by layer."""
    changes = ["--set", "phase.0.match=logits"] if axis == "fsdp" else []
    command = [*PROGRAM, "train", str(recipe), "--quiet", *changes]
    run(1, [*command, "--out", str(tmp_path / "one")])
    run(2, [*command, "--out", str(tmp_path / "two"), "--set", f"parallel.{axis}=2"])
    expected, found = state(tmp_path / "one"), state(tmp_path / "two")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        allowed = TOLERANCE if ".self_attn." in name else 0.0
        error = (found[name].double() - tensor.double()).norm()
        assert error <= allowed * tensor.double().norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_weights_that_stay_are_divided_in_bf16(recipe: Path, tmp_path: Path, axis: str) -> None:
    """Beside fp32 ones that move: a run of two processes ends with the bits of what stays."""
    changes = ["--set", "phase.0.match=logits", "--set", "precision=bf16"]
    command = [*PROGRAM, "train", str(recipe), "--quiet", *changes, "--out", str(tmp_path / "run")]
    run(2, [*command, "--set", f"parallel.{axis}=2"])
    start = tuning.loaded(recipe.parent / "damaged")
    for name, tensor in state(tmp_path / "run").items():
        if name.startswith("model.") and ".self_attn." not in name and tensor.ndim > 1:
            assert torch.equal(tensor, start[name.removeprefix("model.")].bfloat16()), name
