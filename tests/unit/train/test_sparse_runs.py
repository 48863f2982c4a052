"""Runs that train sparse attention (DSA): exact resumption, and recipes that are refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowlat.config.model import IndexerConfig
from lowlat.train.inputs.configs import base_config, check_recipe
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.step.trainable import check_stages
from lowlat.utils.errors import UserError
from tests import configs

from . import runs, tiny, tuning

INDEXER = IndexerConfig(index_n_heads=3, index_head_dim=9, index_topk=3)
FULL = replace(configs.MLA, indexer=INDEXER)
SPARSE_MODEL: dict[str, Any] = runs.MODEL | {
    "model_type": "deepseek_v32",
    "index_n_heads": 3,
    "index_head_dim": 8,
    "index_topk": 5,
}


def stages(**changes: Any) -> dict[str, Any]:
    """Warm-up, then sparse training."""
    short = {"sequence_length": 31, "max_position_embeddings": 64}
    phases = tuning.phases(
        short | {"name": "warm-up", "steps": 3, "dsa_stage": "warmup"},
        short | {"name": "sparse", "steps": 3, "dsa_stage": "sparse"},
    )
    return tuning.raw_recipe(**({"model": SPARSE_MODEL, "phase": phases} | changes))


@pytest.mark.parametrize(
    ("precision", "checkpointing"),
    [
        ("fp32", "none"),
        pytest.param("bf16", "full", marks=pytest.mark.slow),
        pytest.param("fp8", "none", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_resumes_exactly(tmp_path: Path, precision: str, checkpointing: str) -> None:
    """Within the warm-up, at its end and within sparse training; losses and recall are logged."""
    tuning.chats(tmp_path / "tokens")
    raw = stages(
        precision=precision,
        activation_checkpointing=checkpointing,
        checkpoints={"every_steps": 1},
        optimizer={"name": "muon"},
    )
    whole = tuning.train(tmp_path, raw, name="whole")
    for step in (2, 3, 5):
        tuning.stop_after(step, tmp_path, raw, name="parts")
    parts = tuning.train(tmp_path, raw, name="parts")
    tuning.assert_same(parts.saved(), whole.saved())
    records = whole.records("step")
    assert [r["indexers"] for r in parts.records("step")] == [r["indexers"] for r in records]
    for record in records:
        assert [layer["layer"] for layer in record["indexers"]] == [0, 1, 2]
        assert all(layer["kl"] > 0 and 0 < layer["recall"] < 1 for layer in record["indexers"])
    assert whole.outcome.model is not None
    assert tuning.loaded(whole.outcome.model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": runs.MODEL}, "phase warm-up: dsa_stage = 'warmup' needs a model with indexers"),
        (
            {"parallel": {"pipeline": 3}, "model": SPARSE_MODEL | {"model_type": "glm"}},
            "parallel.pipeline 3: 1f1b makes 3 stages of .* in 1 groups that share a choice",
        ),
        ({"distillation": {"teacher": "t"}}, "phase warm-up: .* remove distillation"),
        ({"model": SPARSE_MODEL | {"index_topk": 0}}, "index_topk.*0"),
    ],
)
def test_recipes_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    model_table = changes.get("model")
    if model_table is not None and model_table["model_type"] == "glm":
        glm = {"model_type": "glm_moe_dsa", "indexer_types": ["full", "shared"]}
        changes = changes | {"model": model_table | glm}
    recipe = runs.recipe(**stages(**changes))
    with pytest.raises(UserError, match=said) as caught:
        check_recipe(base_config(recipe, None, 260, "r.toml"), recipe, "r.toml")
    assert "\n" not in str(caught.value)
    assert re.match(r"r\.toml", str(caught.value))


def test_lora_has_no_indexer_loss() -> None:
    phase = tuning.phases({"dsa_indexer_loss_coeff": 0.5})[0] | {"bias_update_speed": 0.0}
    raw = stages(lora={"rank": 2, "alpha": 4}, base_model="b", phase=[phase])
    raw.pop("model")
    said = "phase .*: dsa_indexer_loss_coeff has no effect with lora"
    with pytest.raises(UserError, match=said):
        check_stages(tiny.config(attention=FULL), parse_recipe(raw, origin="r.toml"), "r.toml")
