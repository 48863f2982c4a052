"""Distillation in one call: recipe, result, resuming, errors."""

import signal
from pathlib import Path
from typing import Any

import pytest

from lowlat.data.build import build
from lowlat.data.selection import BuildOptions
from lowlat.train.recipe.schedule import TrainingSchedule
from lowlat.train.recipe.schema import parse_recipe, read_recipe
from lowlat.train.run import distill as distill_module
from lowlat.train.run.distill import (
    BATCH_TOKENS,
    LEARNING_RATE,
    DistillationOptions,
    distill,
    distillation_recipe,
)
from lowlat.utils.errors import UserError
from tests.fakes import byte_tokenizer

from . import recovering, runs, tuning


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healing")
    recovering.models(folder)
    return folder


def call(made: Path, out: Path, **changes: Any) -> distill_module.DistillationResult:
    table = {
        "tokens": 31 * 4 * 10,
        "sequence_length": 31,
        "batch_tokens": 31 * 4,
        "learning_rate": 3e-3,
        "precision": "fp32",
    }
    wanted = DistillationOptions(**(table | changes))
    return distill(made / "damaged", made / "teacher", made / "tokens", out, wanted, quiet=True)


@pytest.mark.slow
def test_a_healed_model_and_what_it_was_before(made: Path, tmp_path: Path) -> None:
    found = call(made, tmp_path / "run")
    assert found.model == tmp_path / "run" / "model"
    assert tuning.loaded(found.model).keys() == tuning.loaded(made / "damaged").keys()
    assert found.before.step == 0 and found.after.step == 10
    assert found.before.divergence is not None and found.after.divergence is not None
    assert found.after.divergence < found.before.divergence
    assert found.tokens == 31 * 4 * 10 and found.seconds > 0
    again = call(made, tmp_path / "run")
    assert again == found
    recipe = read_recipe(tmp_path / "run" / "recipe.toml")
    assert recipe.trainable == "attention" and recipe.distillation is not None
    with pytest.raises(UserError, match=r"learning_rate\.0\.to was 0\.003 and is 0\.002"):
        call(made, tmp_path / "run", learning_rate=2e-3)


@pytest.mark.slow
def test_a_stopped_healing_resumes(made: Path, tmp_path: Path) -> None:
    """To the same bits as one that was not stopped."""
    whole = call(made, tmp_path / "whole", layer_share=0.4)
    with runs.stopped_after(6, signal.SIGTERM):
        call(made, tmp_path / "parts", layer_share=0.4)
    assert not (tmp_path / "parts" / "model").exists()
    parts = call(made, tmp_path / "parts", layer_share=0.4)
    tuning.assert_same(tuning.loaded(parts.model), tuning.loaded(whole.model))
    assert (parts.before.divergence, parts.after.divergence) == (
        whole.before.divergence,
        whole.after.divergence,
    )


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1024, 100_000, 500_000, 2_000_000, 20_000_000])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("layer_share", [None, 0.0, 0.3, 1.0])
def test_recipes_spend_their_budget(tokens: int, optimizer: Any, layer_share: float | None) -> None:
    """Within a step; every schedule begins above zero and ends low."""
    wanted = DistillationOptions(tokens=tokens, optimizer=optimizer, layer_share=layer_share)
    raw = distillation_recipe(Path("s"), Path("t"), Path("d"), wanted)
    timetable = TrainingSchedule(parse_recipe(raw, origin="distillation"))
    step = timetable.at(0).tokens
    assert abs(timetable.tokens - tokens) <= max(step / 2, 1024)
    assert timetable.steps >= min(48, tokens // 1024)
    phases = [timetable.at(index).phase.match for index in range(timetable.steps)]
    assert phases == sorted(phases)  # attention before logits
    layers = round((0.2 if layer_share is None else layer_share) * timetable.steps)
    assert phases.count("attention") == (min(20, layers) if layer_share is None else layers)
    if timetable.steps > 10:
        assert 0 < timetable.at(timetable.steps - 1).learning_rate <= 0.05 * LEARNING_RATE * 1.01
    assert Path(raw["base_model"]).is_absolute() and Path(raw["data"]["folder"]).is_absolute()


@pytest.mark.parametrize(("steps", "share"), [(4, 0.04), (50, 0.5), (100, 1.0), (195, 1.0)])
def test_few_steps_are_small(steps: int, share: float) -> None:
    """Four steps at the whole rate made SmolLM2's divergence ten times what it was."""

    def peak(**more: Any) -> float:
        wanted = DistillationOptions(tokens=steps * BATCH_TOKENS, **more)
        raw = distillation_recipe(Path("s"), Path("t"), Path("d"), wanted)
        assert sum(phase["steps"] for phase in raw["phase"]) == steps
        return raw["phase"][-1]["learning_rate"][0]["to"]

    assert peak() == pytest.approx(share * LEARNING_RATE)
    assert peak(learning_rate=1e-3) == 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 30}, "30 training tokens are less than a sequence of 31"),
        ({"layer_share": 1.5}, "layer_share is 1.5 and must be 0 to 1"),
        ({"sequence_length": 90}, "held-out tokens, at least 91 are needed"),
    ],
)
def test_what_cannot_be_healed_with(
    made: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = tmp_path / "few.txt"
    source.write_text("a text of a few words, of which hardly any are held out\n" * 3)
    build(tmp_path / "tokens", BuildOptions(sources=(str(source),)), byte_tokenizer())
    wanted = {"tokens": 1000, "sequence_length": 31} | changes
    folder = tmp_path if "sequence_length" in changes else made
    with pytest.raises(UserError, match=message):
        distill(
            made / "damaged",
            made / "teacher",
            folder / "tokens",
            tmp_path / "run",
            DistillationOptions(**wanted),
            quiet=True,
        )
    assert not (tmp_path / "run").exists()
