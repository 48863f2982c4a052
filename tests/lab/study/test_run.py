"""Runs of a study: what is kept, what is done again, what a failure leaves alone."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lowlat_lab.study import run as module
from lowlat_lab.study.attention import attention_variants
from lowlat_lab.study.decode import decode_times
from lowlat_lab.study.measure import measure
from lowlat_lab.study.plan import StudyPlan
from lowlat_lab.study.run import model_folder, run_all
from lowlat_lab.study.sizes import StudySize

from lowlat.data.dataset import TokenizedDataset
from lowlat.train.checkpoints.run_folder import RunFolder
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
def test_processes_share_a_study(
    make_plan: MakePlan, data: TokenizedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call trains as many missing runs as it may, and none that another process trains."""
    out = tmp_path / "out"

    def runs(limit: int) -> list[tuple[str, int]]:
        found = run_all(make_plan(limit=limit), data, out, SilentProgress())
        assert all(run.failure is None for run in found)
        return [(run.variant, run.seed) for run in found]

    assert runs(0) == []
    assert runs(1) == [("mha", 1)]
    with RunFolder(out / "mla" / "seed-1"):
        assert runs(1) == [("mha", 1), ("mla", 2)]
    monkeypatch.setattr(module, "Trainer", refuse)
    assert runs(0) == [("mha", 1), ("mla", 2)]


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
        assert run.result["window_losses"] == pytest.approx(whole.window_losses[:7], abs=1e-6)


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
    times = decode_times(
        models, data, contexts=(29, 31), reference="mla", progress=SilentProgress()
    )
    assert list(times) == ["mha", "mla"]
    for own in times.values():
        assert [time.context for time in own] == [29, 31]
        assert all(len(time.rounds) == 5 and min(time.rounds) > 0 for time in own)


@pytest.mark.slow
def test_decode_time_without_native_kernels_is_estimated(
    make_plan: MakePlan, data: TokenizedDataset, size: StudySize, tmp_path: Path
) -> None:
    every = {each.name: each for each in attention_variants(size, data.vocab_size)}
    plan = make_plan(seeds=(1,), steps=1, variants=(every["mla"], every["mla-gated"]))
    run_all(plan, data, tmp_path / "out", SilentProgress())
    models = {name: model_folder(tmp_path / "out", name, 1) for name in ("mla", "mla-gated")}
    times = decode_times(models, data, contexts=(29,), reference="mla", progress=SilentProgress())
    (mla,), (gated,) = times["mla"], times["mla-gated"]
    assert mla.is_measured and not gated.is_measured
    # equal parameters, equal cache
    assert gated.milliseconds == pytest.approx(mla.milliseconds, rel=0.02)
