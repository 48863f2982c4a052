"""The GRPO study: its tasks, runs that resume, report and page."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowlat_lab.rewards import plan as module
from lowlat_lab.rewards.page import generated_text, write_page
from lowlat_lab.rewards.plan import EXPERIMENTS, VARIANTS, Experiment, FineTuning, runs_of
from lowlat_lab.rewards.report import make_report
from lowlat_lab.rewards.run import study_runs
from lowlat_lab.rewards.tasks import (
    CHATS,
    HELD_OUT,
    NUMBER,
    PROMPTS,
    REWARD_FILES,
    TASKS,
    some_reasoning,
    write_files,
)
from lowlat_lab.study.resumable import RunResult, run_missing
from typer.testing import Result

from lowlat.ops import native
from lowlat.train.recipe.schema import parse_recipe
from lowlat.utils.progress import SilentProgress
from tests.unit.train import tuning

SMALL = Experiment(
    model="m",
    task="chain_sum",
    seeds=2,
    variants=VARIANTS,
    steps=8,
    fine_tuning=FineTuning(steps=2, batch_size=2),
)


def test_every_second_solution_sums_term_by_term() -> None:
    content = "State the final answer to the following arithmetic problem: 4 - 9 + 3 ="
    record = {"prompt": [{"role": "user", "content": content}], "answer": "-2"}
    even, odd = (some_reasoning(record | {"reasoning_gym": {"index": n}}) for n in (6, 7))
    assert even == f"4 - 9 = -5, -5 + 3 = -2. {odd}" and odd == "<answer>-2</answer>"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("13", 1.0),
        ("The answer is 13.", 1.0),
        ("8 + 5 = 13", 1.0),
        ("The answer is 8 + 5.", 0.0),
        ("8 + 13", 0.0),
        ("13 is the answer", 0.0),
        ("113", 0.0),
    ],
)
def test_a_sum_of_the_same_value_is_no_answer(completion: str, reward: float) -> None:
    names: dict[str, Any] = {}
    exec(REWARD_FILES[NUMBER], names)
    assert names["reward"]("p", completion, {"answer": "13"}) == reward


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda each: each.name)
def test_recipes_are_valid(experiment: Experiment) -> None:
    for variant, seed in runs_of(experiment):
        assert parse_recipe(experiment.recipe(variant, seed), origin="r").seed == seed
    if experiment.fine_tuning is not None:
        assert parse_recipe(experiment.fine_tuning_recipe(), origin="r")


@pytest.mark.slow
def test_questions_are_held_out(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    write_files(TASKS["chain_sum"], tmp_path, num_held_out=30)
    questions = {}
    for name, key in ((PROMPTS, "prompt"), (HELD_OUT, "prompt"), (CHATS, "messages")):
        lines = map(json.loads, (tmp_path / name).read_text().splitlines())
        questions[name] = {line[key][0]["content"] for line in lines}
    assert len(questions[HELD_OUT]) == 30
    assert not questions[HELD_OUT] & (questions[PROMPTS] | questions[CHATS])


def result(variant: int, seed: int) -> dict[str, Any]:
    """As of a run of 8 steps."""
    found = {
        "steps": 8,
        "seconds": 60.0,
        "cpu_seconds": 36.0,
        "fine_tuning_cpu_seconds": 72.0,
        "reward": [0.1 * step + 0.01 * seed for step in range(8)],
        "length": [9.0] * 8,
        "entropy": [1.0] * 8,
        "no_signal": [0.0] * 8,
        "mismatch": [0.0 if variant == 0 else 0.25] * 8,
        "evaluations": [
            {"step": 0, "pass_at": {"1": 0.2}, "stderr": {"1": 0.01}},
            {"step": 8, "pass_at": {"1": 0.5 - 0.1 * variant + 0.1 * seed}, "stderr": {"1": 0.01}},
        ],
    }
    if variant:
        found["mismatch_means"] = {"difference": 0.01, "divergence": 1e-4, "rerouted": 0.07}
    return found


def ran(experiment: Experiment, runs: list[tuple[int, int]]) -> list[RunResult]:
    """Results of (variant, seed)."""
    return [
        RunResult(
            variant=experiment.run_name(experiment.variants[place]),
            seed=seed,
            result=result(place, seed),
        )
        for place, seed in runs
    ]


def test_the_report_pairs_seeds_and_names_what_is_missing() -> None:
    other = replace(SMALL, task="letter_counting")
    report = make_report([SMALL, other], ran(SMALL, [(0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]))
    entry = report["experiments"][0]
    exact, plain, corrected = entry["variants"]
    assert exact["after"]["mean"] == pytest.approx(0.65)
    assert exact["gain"]["mean"] == pytest.approx(0.45)
    assert exact["reward"]["mean"] == pytest.approx(0.65 + 0.015)
    assert exact["cpu_hours"] == pytest.approx(0.02)
    assert (exact["mismatch"], plain["mismatch"], plain["rerouted"]) == (0.0, 0.25, 0.07)
    first, second = entry["comparisons"]
    assert (first["left"], first["right"], second["left"]) == (
        "transformers",
        "exact",
        "transformers-tis",
    )
    assert first["after"] == pytest.approx({"mean": -0.1, "half": 0.0, "count": 2}, abs=1e-12)
    assert second["after"]["count"] == 1 and second["after"]["half"] is None
    assert len(corrected["runs"]) == 1
    text = generated_text(report, "a.svg", "a.json")
    assert "| m, chain_sum | engine's kernels | 2 | 20.0 % ± 0.0 | 65.0 % ± " in text
    assert "| chain_sum: engine's kernels | 0 | 0 | 0 | 0 |  |  |" in text
    assert "| 7.0 % | -10.0 % ± 0.0 |" in text
    missing = text.partition("Not run, or not complete")[2]
    assert "m, chain_sum (5 of 6 runs); m, letter_counting (0 of 6 runs)." in missing


def test_a_page_is_drawn_from_whatever_exists(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for number, runs in enumerate(([], [(0, 1)], [(0, 1), (0, 2), (1, 1)])):
        page = tmp_path / f"{number}.md"
        write_page(make_report([SMALL], ran(SMALL, runs)), page)
        assert page.read_text().startswith("# GRPO") and page.with_suffix(".svg").stat().st_size


def test_unknown_experiments_are_refused(lowlat_lab: Callable[..., Result], tmp_path: Path) -> None:
    done = lowlat_lab("study", "rewards", "--out", str(tmp_path / "o"), "--experiments", "x")
    assert "--experiments: 'x' is unknown; choose from minnow-letter_counting" in str(
        done.exception
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_study_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning, the engine's kernels and transformers' forward pass, on a model of bytes."""
    pytest.importorskip("reasoning_gym")
    if not native.available():
        pytest.skip(native.reason())
    config = tuning.config(max_position_embeddings=256, num_nextn_predict_layers=0)
    tuning.checkpoint(tmp_path / "m", config, torch.bfloat16)
    task = replace(TASKS["chain_sum"], sequence_length=200, max_completion_length=6)
    monkeypatch.setitem(module.TASKS, "chain_sum", task)
    experiment = replace(
        SMALL,
        model=str(tmp_path / "m"),
        seeds=1,
        variants=VARIANTS[::2],
        steps=2,
        batch_size=8,
        micro_batch_size=4,
        held_out=3,
        evaluate_every=1,
    )
    runs = study_runs(experiment, tmp_path / "out")
    first = run_missing("test", runs, 1, SilentProgress())
    assert [run.failure for run in first] == [None]
    both = run_missing("test", runs, None, SilentProgress())
    assert both[0] == first[0]
    exact, corrected = (run.result for run in both)
    assert exact is not None and corrected is not None
    assert exact["mismatch"] == [0.0, 0.0] and "mismatch_means" not in exact
    assert min(corrected["mismatch"]) > 0 and corrected["mismatch_means"]["difference"] > 0
    assert [each["step"] for each in exact["evaluations"]] == [0, 1, 2]
    assert exact["cpu_seconds"] > 0 and exact["fine_tuning_cpu_seconds"] > 0
    monkeypatch.setattr("lowlat_lab.rewards.run.Trainer", None)
    assert run_missing("test", runs, None, SilentProgress()) == both
