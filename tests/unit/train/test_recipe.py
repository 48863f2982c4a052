"""Recipes from TOML: what is read, what is refused, and how it is said."""

from pathlib import Path
from typing import Any

import pytest

from lowlat.train.recipe.schedule import TrainingSchedule
from lowlat.train.recipe.schema import Segment, parse_recipe, read_recipe
from lowlat.utils.errors import UserError

TEXT = """
name = "small"
seed = 7
precision = "fp32"
[model]
hidden_size = 24
[data]
folder = "tokens"
[optimizer]
name = "muon"
betas = [0.8, 0.99]
[[phase]]
name = "first"
steps = 9
sequence_length = 17
batch_size = [{ to = 2, steps = 1 }, { to = 6 }]
micro_batch_size = 2
learning_rate = [{ to = 3e-3, steps = 4 }, { to = 1e-4, shape = "cosine" }]
[[phase]]
name = "second"
steps = 3
sequence_length = 23
batch_size = 4
micro_batch_size = 2
learning_rate = 1
rope_scaling = { rope_type = "yarn", factor = 4.0 }
[phase.data]
folder = "other"
document_masks = true
fim_rate = 0.1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    return path


def test_what_is_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert (recipe.name, recipe.seed, recipe.model) == ("small", 7, {"hidden_size": 24})
    assert recipe.optimizer.betas == (0.8, 0.99) and recipe.optimizer.weight_decay == 0.1
    first, second = recipe.phase
    assert first.batch_size == [Segment(to=2.0, steps=1), Segment(to=6.0)]
    assert isinstance(first.learning_rate, list) and first.learning_rate[1].shape == "cosine"
    assert (second.learning_rate, second.mtp_weight, second.bias_update_speed) == (1.0, 0.3, 1e-3)
    assert second.data is not None and second.data.document_masks and first.data is None
    assert recipe.parallel.processes == 1


def test_recipes_are_frozen(path: Path) -> None:
    recipe = read_recipe(path)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_a_written_recipe_is_the_same(path: Path) -> None:
    """What a save keeps of a recipe is the recipe."""
    recipe = read_recipe(path)
    assert parse_recipe(recipe.model_dump(mode="json"), origin="save") == recipe


def test_changes(path: Path) -> None:
    changes = [
        "seed=1",
        "phase.0.steps=50",
        "phase.1.learning_rate=[{ to = 0.5, steps = 1 }]",
        "optimizer.betas=[0.5, 0.6]",
        "checkpoints.every_steps=3",
        "name=other",
        'precision="bf16"',
        "phase.1.batch_size=8",
        "model.hidden_size=48",
    ]
    recipe = read_recipe(path, changes)
    assert (recipe.seed, recipe.name, recipe.precision) == (1, "other", "bf16")
    assert recipe.phase[0].steps == 50 and recipe.phase[1].batch_size == 8
    assert recipe.phase[1].learning_rate == [Segment(to=0.5, steps=1)]
    assert recipe.optimizer.betas == (0.5, 0.6) and recipe.checkpoints.every_steps == 3
    assert recipe.model == {"hidden_size": 48}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed", "--set seed: write key=value"),
        ("=3", "--set =3: write key=value"),
        ("phase.2.steps=5", "--set phase.2.steps=5: the recipe has no such place"),
        ("phase.\u00b2.steps=5", "--set phase.\u00b2.steps=5: the recipe has no such place"),
        ("phase.first.steps=5", "--set phase.first.steps=5: the recipe has no such place"),
        ("seed.deep=5", "--set seed.deep=5: the recipe has no such place"),
        ("phase.7=5", "--set phase.7=5: the recipe has no such place"),
        ("sed=1", "recipe.toml: sed is not a key of recipes"),
        ("optimizer.lr=1", "recipe.toml: optimizer.lr is not a key of recipes"),
        ("phase.0.batch=1", "recipe.toml: phase.0.batch is not a key of recipes"),
        ("phase.1.data.folders=1", "recipe.toml: phase.1.data.folders is not a key of recipes"),
        ("seed=1.5", "recipe.toml: seed: "),
        ("seed=-1", "recipe.toml: seed: "),
        ("phase.0.steps=0", "recipe.toml: phase.0.steps: "),
        ("phase.0.steps=true", "recipe.toml: phase.0.steps: "),
        ("phase.0.steps=fast", "recipe.toml: phase.0.steps: "),
        ("optimizer.betas=[0.5]", "recipe.toml: optimizer.betas"),
        ("optimizer.betas=[0.5, 1.5]", "recipe.toml: optimizer.betas.1: "),
        ("optimizer.betas=[0.5, 1.0]", "recipe.toml: optimizer.betas.1: "),
        ("optimizer.momentum=1.0", "recipe.toml: optimizer.momentum: "),
        ("optimizer.eps=0.0", "recipe.toml: optimizer.eps: "),
        ("optimizer.name=sgd", "recipe.toml: optimizer.name: "),
        ("optimizer.max_grad_norm=inf", "recipe.toml: optimizer.max_grad_norm: "),
        ("optimizer.weight_decay=nan", "recipe.toml: optimizer.weight_decay: "),
        ("phase.0.z_weight=-0.1", "recipe.toml: phase.0.z_weight: "),
        ("phase.0.learning_rate=-1", "recipe.toml: phase.0.learning_rate"),
        ("phase.0.learning_rate=[]", "recipe.toml: phase.0.learning_rate"),
        ("phase.0.learning_rate=fast", "recipe.toml: phase.0.learning_rate"),
        ("phase.0.learning_rate=[{ to = 1, step = 2 }]", "recipe.toml: phase.0.learning_rate"),
        ("name=../up", "recipe.toml: name: "),
        ("base_model=elsewhere", "give either [model] or base_model, not both"),
        ("lora.rank=4", "recipe.toml: lora.alpha is missing"),
        ("lora={ rank = 1, alpha = 1, target_modules = [] }", "recipe.toml: lora.target_modules: "),
        ("checkpoints.keep_last=1", "recipe.toml: checkpoints.keep_last: "),
        ("checkpoints.keep_every_hours=0", "recipe.toml: checkpoints.keep_every_hours: "),
        ("checkpoints.keep_every_hours=1e23", "recipe.toml: checkpoints.keep_every_hours: "),
        ("phase.0.steps=100000000", "recipe.toml: phase.0.steps: "),
        ("model.rope_theta=inf", "recipe.toml: model: rope_theta must be finite numbers"),
        ("model.pad_token_id=2026-01-01", "recipe.toml: model: pad_token_id must be finite"),
        (
            "phase.0.rope_scaling={ factor = nan }",
            "recipe.toml: phase.0.rope_scaling: factor must be finite",
        ),
        ("phase=[]", "recipe.toml: phase: "),
        (
            "phase.0.learning_rate=[{ to = 1 }, { to = 2 }]",
            "recipe.toml: phase.0: learning_rate: only the last segment may go without steps",
        ),
        (
            "phase.0.learning_rate=[{ to = 1, steps = 5 }, { to = 2, steps = 5 }]",
            "recipe.toml: phase.0: learning_rate: its segments last longer than steps 9",
        ),
        (
            "parallel.fsdp=4",
            "recipe.toml: phase second: batch_size 4 is not a multiple of 8, micro_batch_size 2 x "
            "parallel.data 1 x parallel.fsdp 4; change one of them",
        ),
    ],
)
def test_refusals(path: Path, change: str, said: str) -> None:
    """One line that names the file and the key, with no word of the library that checks it."""
    with pytest.raises(UserError) as caught:
        read_recipe(path, [change])
    message = str(caught.value)
    assert said in message
    assert "\n" not in message and "pydantic" not in message and "constrained" not in message
    assert "Value error" not in message and "list[" not in message


@pytest.mark.parametrize("parallel", [{}, {"data": 2}, {"fsdp": 2}, {"tensor": 4, "context": 2}])
def test_no_layout_changes_a_constant_batch(path: Path, parallel: dict[str, int]) -> None:
    """Regression: 8 rows of micro-batches of 4 that became 32 on 8 processes."""
    recipe = read_recipe(path, [f"parallel.{axis}={size}" for axis, size in parallel.items()])
    ranks = recipe.parallel.data * recipe.parallel.fsdp
    assert [TrainingSchedule(recipe, ranks=ranks).at(step).rows for step in (9, 10, 11)] == [4] * 3


def test_ramps_are_rounded_instead(path: Path) -> None:
    changes = ["parallel.data=2", "parallel.fsdp=4", "phase.1.batch_size=16"]
    recipe = read_recipe(path, changes)
    assert {TrainingSchedule(recipe, ranks=8).at(step).rows for step in range(9)} == {16}


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.toml: cannot be read \(No such file"):
        read_recipe(tmp_path / "missing.toml")
    for content in (b"name = ", b"\xff\xfe"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.toml: is not TOML"):
            read_recipe(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("")
    with pytest.raises(UserError, match=r"bad.toml: name is missing"):
        read_recipe(tmp_path / "bad.toml")


def test_lora_needs_a_checkpoint() -> None:
    raw: dict[str, Any] = {
        "name": "t",
        "model": {},
        "data": {"folder": "x"},
        "lora": {"rank": 2, "alpha": 4},
        "phase": [
            {
                "name": "p",
                "steps": 1,
                "sequence_length": 1,
                "batch_size": 1,
                "micro_batch_size": 1,
                "learning_rate": 1,
            }
        ],
    }
    with pytest.raises(UserError, match="lora needs base_model"):
        parse_recipe(raw, origin="test")
