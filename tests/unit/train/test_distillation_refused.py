"""Learning from a teacher: what does not go together is named before a run begins."""

from pathlib import Path
from typing import Any

import pytest

from lowlat.train.recipe.schema import parse_recipe
from lowlat.utils.errors import UserError

from . import recovering


@pytest.fixture
def folder(teacher_folder: Path) -> Path:
    return teacher_folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers without a teacher": (
        {"phase": [recovering.PHASE | {"match": "layers"}], "distillation": None},
        r"phase\.match needs \[distillation\]",
    ),
    "updates and attention": (
        {"lora": {"rank": 2, "alpha": 2.0}},
        "trainable: lora.target_modules decides what is trained",
    ),
    "fp8 with a teacher": (
        {"precision": "fp8", "trainable": "all"},
        "distillation trains in bf16 or fp32",
    ),
    "fp8 of attention": ({"precision": "fp8"}, "trainable = 'attention' trains in bf16 or fp32"),
    "z-loss": (
        {"phase": [recovering.PHASE | {"z_weight": 0.1}]},
        "phase heal: distillation does not support z_weight",
    ),
    "no teacher": ({"distillation": {}}, r"distillation\.teacher is missing"),
    "unknown key": (
        {"distillation": {"teacher": "t", "temperatur": 2.0}},
        r"distillation\.temperatur is not a key",
    ),
    "other parts": ({"trainable": "mlp"}, "trainable: must be 'all' or 'attention', not 'mlp'"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_named(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = {k: v for k, v in (recovering.raw() | changes).items() if v is not None}
    with pytest.raises(UserError, match=message) as caught:
        recovering.train(folder, recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "expert", "context"])
@pytest.mark.parametrize("trainable", ["all", "attention"])
def test_other_divisions_than_of_batches_are_refused(
    folder: Path, axis: str, trainable: str
) -> None:
    """Before processes of such a run are asked for anything."""
    from lowlat.train.inputs.run_inputs import open_phases

    recipe = parse_recipe(recovering.raw(parallel={axis: 2}, trainable=trainable), origin="r.toml")
    with pytest.raises(UserError, match=rf"does not support parallel\.{axis} 2"):
        open_phases(recipe, folder / "damaged", folder, "r.toml", folder / "teacher")


@pytest.mark.parametrize(
    ("changes", "phase", "message"),
    [
        ({"vocab_size": 271}, {}, "teacher has a vocabulary of 271, the model one of 263"),
        (
            {"max_position_embeddings": 23},
            {},
            "phase heal: sequence_length 31 exceeds the teacher's context of 23",
        ),
        (
            {"num_hidden_layers": 3},
            {"match": "layers"},
            "num_hidden_layers is 2 and the teacher's 3; match 'logits'",
        ),
        ({"hidden_size": 29}, {"match": "attention"}, "hidden_size is 23 and the teacher's 29"),
    ],
)
def test_teachers_that_do_not_fit(
    folder: Path, changes: dict[str, Any], phase: dict[str, Any], message: str
) -> None:
    (folder / "teacher").unlink()
    recovering.teacher(folder, **changes)
    with pytest.raises(UserError, match=message):
        recovering.train(folder, recovering.raw(phase))
