"""Runs of a study: what is kept, what is done again, what a failure leaves alone."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lowlat_lab.study import run as module
from lowlat_lab.study.decode import Speed, decode_speeds
from lowlat_lab.study.measure import measure
from lowlat_lab.study.plan import StudyPlan
from lowlat_lab.study.run import model_folder, run_all

from lowlat.data.dataset import TokenizedDataset
from lowlat.train.recipe.schema import parse_recipe
from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress

MakePlan = Callable[..., StudyPlan]


def refuse(*_arguments: Any, **_options: Any) -> None:
    raise RuntimeError("nothing is to be trained")


def test_a_study_is_run_once(
    make_plan: MakePlan, data: TokenizedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = make_plan(), tmp_path / "out"
    first = run_all(plan, data, out, SilentProgress())
    assert [run.failure for run in first] == [None] * 4
    folder = out / "mla" / "seed-2"
    assert not (folder / "saves").exists() and (folder / "model" / "config.json").is_file()
    kept = parse_recipe(tomllib.loads((folder / "recipe.toml").read_text()), origin="kept")
    assert kept == plan.recipe(plan.variants[1], 2)
    monkeypatch.setattr(module, "Trainer", refuse)
    assert run_all(plan, data, out, SilentProgress()) == first
    with pytest.raises(UserError, match=r"mha.seed-1: holds a run of another study: .*steps was 4"):
        run_all(make_plan(steps=5), data, out, SilentProgress())


@pytest.mark.slow
def test_losses_are_those_the_trainer_finds(
    make_plan: MakePlan, data: TokenizedDataset, tmp_path: Path
) -> None:
    """The measured model is the saved one, in bf16, on the windows the trainer evaluates."""
    plan = make_plan(seeds=(1,))
    for run in run_all(plan, data, tmp_path / "out", SilentProgress()):
        assert run.result is not None
        tokens, loss = run.result["curve"][-1]
        assert tokens == plan.tokens
        recipe = plan.recipe(
            next(variant for variant in plan.variants if variant.name == run.variant), 1
        )
        folder = model_folder(tmp_path / "out", run.variant, 1)
        whole = measure(folder, recipe, most_windows=32, progress=SilentProgress())
        assert whole.loss == pytest.approx(loss, abs=5e-3)
        assert len(run.result["window_losses"]) == plan.size.held_out_windows
        assert run.result["window_losses"] == list(whole.window_losses[:7])


@pytest.mark.slow
def test_a_failure_leaves_the_others_alone(
    make_plan: MakePlan,
    data: TokenizedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan, out, whole = make_plan(seeds=(1,)), tmp_path / "out", module.measure

    def failing(folder: Path, *arguments: Any, **options: Any) -> Any:
        if "mha" in folder.parts:
            raise RuntimeError("out of memory\nand more")
        return whole(folder, *arguments, **options)

    monkeypatch.setattr(module, "measure", failing)
    first, second = run_all(plan, data, out, SilentProgress())
    assert (first.variant, first.result) == ("mha", None)
    assert first.failure == "RuntimeError: out of memory"
    assert second.result is not None and second.failure is None
    assert "mha, seed 1: failed" in capsys.readouterr().err
    monkeypatch.setattr(module, "measure", whole)
    again = run_all(plan, data, out, SilentProgress())
    assert [run.failure for run in again] == [None, None] and again[1] == second


@pytest.mark.slow
def test_decoding_takes_turns_and_goes_through_the_engine(
    make_plan: MakePlan, data: TokenizedDataset, tmp_path: Path
) -> None:
    plan = make_plan(seeds=(1,))
    run_all(plan, data, tmp_path / "out", SilentProgress())
    models = {
        variant.name: model_folder(tmp_path / "out", variant.name, 1) for variant in plan.variants
    }
    speeds = decode_speeds(models, data, context=29, progress=SilentProgress())
    assert list(speeds) == ["mha", "mla"]
    assert all(len(speed.rounds) == 5 and min(speed.rounds) > 0 for speed in speeds.values())


def test_ratios_are_of_the_same_round() -> None:
    own = Speed(context=1, is_native=True, rounds=[10.0, 40.0, 4.0])
    other = Speed(context=1, is_native=True, rounds=[5.0, 20.0, 2.0])
    assert own.ratio(other) == 2.0 and own.median == 10.0
