"""The recipes that come with the project."""

import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from lowlat.checkpoint.load import load_model
from lowlat.cli.main import app
from lowlat.plan.estimate import estimate
from lowlat.plan.machine import H100
from lowlat.train.cost.dry_run import job_of
from lowlat.train.inputs.configs import base_config, phase_configs, recipe_config
from lowlat.train.inputs.parallel_check import check_parallel
from lowlat.train.recipe.schedule import TrainingSchedule, batch_size
from lowlat.train.recipe.schema import Recipe, parse_recipe, read_recipe
from lowlat.train.run.distill import DistillationOptions, distillation_recipe
from lowlat.train.step.lora import check_lora

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
VOCAB = 49152


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    """It is read, is named as its file, has the model of every phase, divides as it says, and every
    batch is what it says without rounding.
    """
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    ranks = recipe.parallel.data * recipe.parallel.fsdp
    schedule = TrainingSchedule(recipe, ranks=ranks)
    for phase in recipe.phase:
        if not isinstance(phase.batch_size, list):
            assert phase.batch_size % (phase.micro_batch_size * ranks) == 0
    assert all(schedule.at(step).learning_rate > 0 for step in (0, schedule.steps - 1))
    if recipe.model is not None:
        vocab = recipe.model.get("vocab_size", VOCAB)
        config = base_config(recipe, None, vocab, str(path))
        configs = phase_configs(config, recipe, str(path))
        assert len(configs) == len(recipe.phase)
        check_parallel(config, recipe, str(path))
        check_lora(config, recipe, str(path))
    assert f"../recipes/{path.name}" in (ROOT / "docs" / "training.md").read_text()


def test_the_grpo_recipe_of_its_page_is_valid() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text()
    text = "".join(re.findall(r"```toml\n(.*?)```", page, re.DOTALL))
    recipe = parse_recipe(tomllib.loads(text), origin="rewards.md")
    assert recipe.phase[0].grpo is not None
    assert recipe.evaluation.prompts


def test_heal_recipe_is_what_convert_does() -> None:
    """heal.toml and `lowlat convert --heal 2M` train alike, whatever their folders are called."""
    here = Path(".")
    raw = distillation_recipe(here, here, here, DistillationOptions(tokens=2_000_000))
    done, recipe = (
        parse_recipe(raw, origin="distillation"),
        read_recipe(ROOT / "recipes" / "heal.toml"),
    )
    tables = [TrainingSchedule(each, ranks=1) for each in (done, recipe)]
    assert tables[0].steps == tables[1].steps
    for step in range(tables[0].steps):
        rates = [table.at(step).learning_rate for table in tables]
        assert rates[0] == pytest.approx(rates[1], rel=1e-9)
    assert _beside_folders(done) == _beside_folders(recipe)


def test_healing_in_turn_is_heal_on_two_texts() -> None:
    """One rate that falls over both texts, as heal's over one."""
    recipes = [read_recipe(ROOT / "recipes" / name) for name in ("heal.toml", "heal-in-turn.toml")]
    heal_table, in_turn = (TrainingSchedule(recipe, ranks=1) for recipe in recipes)
    assert heal_table.steps == in_turn.steps
    assert heal_table.tokens == in_turn.tokens
    for step in range(in_turn.steps):
        plans = heal_table.at(step), in_turn.at(step)
        assert plans[0].phase.match == plans[1].phase.match
        assert plans[0].learning_rate == pytest.approx(plans[1].learning_rate, rel=0.01)
    folders = {phase.data.folder if phase.data else "" for phase in recipes[1].phase}
    assert len(folders) == 2


def _beside_folders(recipe: Recipe) -> Recipe:
    assert recipe.distillation is not None
    return recipe.model_copy(
        update={
            "name": "",
            "base_model": None,
            "distillation": recipe.distillation.model_copy(update={"teacher": ""}),
            "data": recipe.data.model_copy(update={"folder": ""}),
            "phase": [
                phase.model_copy(update={"name": "", "learning_rate": 0.0})
                for phase in recipe.phase
            ],
        }
    )


def test_large_recipe_is_the_reports() -> None:
    """Schedules of DeepSeek-V3 in proportion: 1.33T tokens, lambda and gamma at both ends of each
    phase, the context extended twice.
    """
    recipe = read_recipe(ROOT / "recipes" / "deepseek-v3-16b.toml")
    schedule = TrainingSchedule(recipe, ranks=8)
    assert schedule.tokens == pytest.approx(1.33e12, rel=0.03)
    first, later, last = (schedule.at(step) for step in (0, 69_999, 71_999))
    assert (first.mtp_weight, later.mtp_weight, last.mtp_weight) == (0.3, 0.1, 0.1)
    assert (first.bias_update_speed, later.bias_update_speed) == (1e-3, 0.0)
    assert schedule.at(1999).learning_rate == schedule.at(45_999).learning_rate == 4.2e-4
    assert later.learning_rate == pytest.approx(4.2e-5)
    assert [phase.max_position_embeddings for phase in recipe.phase] == [None, 32768, 163840]


def test_large_recipe_fits_its_machine() -> None:
    """Every phase on 32 H100, at the MFU that its head says."""
    path = ROOT / "recipes" / "deepseek-v3-16b.toml"
    recipe = read_recipe(path)
    config = recipe_config(recipe, path, None)
    jobs = [
        replace(job_of(recipe, phase), batch_size=batch_size(phase, 0, phase.micro_batch_size * 8))
        for phase in recipe.phase
    ]
    first, *later = (estimate(config, job, H100) for job in jobs)
    assert len(later) == 2 and all(found.fits for found in (first, *later))
    assert first.mfu == pytest.approx(0.34, abs=0.01)
    assert all(found.mfu > 0.3 for found in later)
    quick = estimate(config, replace(first.job, activation_checkpointing="none"), H100)
    assert quick.fits and quick.mfu == pytest.approx(0.44, abs=0.01)


@pytest.mark.slow
def test_tiny_then_long_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands in the heads of both recipes, for a step of each phase: a vocabulary of the
    documentation, a model, the same model with sixteen times its context.
    """
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "recipes").mkdir()
    for name in ("tiny", "long-context"):
        shutil.copy(ROOT / "recipes" / f"{name}.toml", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    invoke("data", "build", "recipes/tiny-tokens", "docs", "--only", "*.md", "--train-bpe", "2048")
    small = ["--set", "phase.0.batch_size=2", "--set", "phase.0.micro_batch_size=2", "--quiet"]
    rate = ["--set", "phase.0.learning_rate=1e-3", "--set", "log.tensorboard=false"]
    invoke("train", "recipes/tiny.toml", "--set", "phase.0.steps=1", *small, *rate)
    once = [
        "--set",
        "phase.0.steps=1",
        "--set",
        "phase.1.steps=1",
        "--set",
        "evaluation.sequences=1",
    ]
    invoke("train", "recipes/long-context.toml", *once, *rate, "--quiet")
    config = load_model(tmp_path / "runs" / "long-context" / "model").config
    assert config.max_position_embeddings == 4096
    assert config.rope.factor == 16.0 and config.rope.original_max_position_embeddings == 256
    assert config.num_nextn_predict_layers == 1


def invoke(*arguments: str) -> None:
    """The command line, which must succeed."""
    app(list(arguments), standalone_mode=False)
