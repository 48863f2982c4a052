"""pass@k on held-out prompts: the estimator, evaluations of a run, and lowlat eval."""

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from typer.testing import CliRunner

from lowlat.cli.main import app
from lowlat.ops import native
from lowlat.train.policy.evaluation import evaluate_completions, pass_at_k
from lowlat.train.policy.prompts import PromptRecord
from lowlat.train.policy.rollouts import Rollout
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.recipe.tables import EvaluationConfig
from lowlat.train.rewards.sample import RewardFailure, Score
from lowlat.train.rewards.workers import RewardWorkers
from lowlat.utils.errors import UserError
from tests.fakes import byte_tokenizer
from tests.unit.train import tuning
from tests.unit.train.policy.test_grpo import REWARD, raw_recipe, train, write_prompts

needs_native = pytest.mark.skipif(not native.available(), reason="native kernels")
HELD_OUT = {
    "prompts": "held-out.jsonl",
    "every_steps": 1,
    "num_generations": 3,
    "pass_at": [1, 3],
    "pass_threshold": 4.0,
}


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([place < c for place in range(n)], k))
        share = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_exact_for_many_samples() -> None:
    """The estimator of the paper's appendix, which avoids large binomials."""
    product = math.prod(1.0 - 10 / own for own in range(118, 129))
    assert pass_at_k(128, 11, 10) == pytest.approx(1.0 - product, rel=1e-12)


def evaluated(scores: Sequence[Sequence[Score]], **table: Any) -> Any:
    rewards = create_autospec(RewardWorkers, instance=True)
    rewards.score.return_value = scores
    prompts = [PromptRecord(prompt=text, record={}, ids=(1,)) for text in ("a", "b")]
    size = len(scores) // 2
    groups = [
        [
            Rollout(prompt=prompt, completion=(98,) * (1 + n), logprobs=(), is_truncated=n == 1)
            for n in range(size)
        ]
        for prompt in prompts
    ]
    options = EvaluationConfig(num_generations=size, **table)
    return evaluate_completions(groups, rewards, byte_tokenizer(), options)


def test_figures_by_hand() -> None:
    """The first function decides; a failed reward does not pass."""
    failure = RewardFailure("f", "raised", "why")
    rows = [[1.0, 0.0], [0.5, 9.0], [0.0, 9.0], [failure, 9.0], [1.0, 0.0], [1.0, 0.0]]
    found = evaluated(rows, pass_at=(1, 2))
    record = found.record
    assert (record.num_prompts, record.num_generations, record.failed) == (2, 3, 1)
    assert record.pass_at == {"1": pytest.approx(0.5), "2": pytest.approx((2 / 3 + 1) / 2)}
    assert record.stderr["1"] == pytest.approx(1 / 6)  # of 1/3 and 2/3
    assert record.score == pytest.approx(0.7)
    assert (record.length, record.truncated) == (2.0, pytest.approx(1 / 3))
    assert found.failure is failure
    assert [sample["passes"] for sample in found.samples] == [True, False, False, False, True, True]
    assert found.samples[3]["score"] == "f: raised: why"
    # The end token is no text.
    assert [sample["completion"] for sample in found.samples[:3]] == ["", "bb", "bb"]


def test_the_threshold_is_what_passes() -> None:
    assert evaluated([[0.5], [0.4]], pass_threshold=0.5).record.pass_at == {"1": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("held-out")
    tuning.checkpoint(made / "base", tuning.config(), torch.bfloat16)
    write_prompts(made / "prompts.jsonl", ["P", "a", "8"])
    write_prompts(made / "held-out.jsonl", ["b", "Q", "a"])
    (made / "reward.py").write_text(REWARD)
    return made


def short_recipe(**changes: Any) -> dict[str, Any]:
    raw = raw_recipe(**changes)
    raw["phase"][0] |= {"steps": 1}
    return raw


def read_samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_native
def test_a_run_and_lowlat_eval_of_its_model_agree(folder: Path) -> None:
    run = train(folder, short_recipe(evaluation=HELD_OUT), "evaluated")
    before, after = run.records("evaluation")
    assert (before["step"], after["step"]) == (0, 1)
    assert before["split"] == "held_out_prompts" and before["loss"] is None
    assert any("1 of 3 prompts of evaluation.prompts" in n["text"] for n in run.records("note"))
    kept = read_samples(run.path / "samples" / "held-out-00000001.jsonl")
    passes = [sum(own["passes"] for own in kept[first : first + 3]) for first in (0, 3, 6)]
    assert after["pass_at_k"]["pass_at"]["1"] == pytest.approx(sum(passes) / 9)
    assert after["pass_at_k"]["pass_at"]["3"] == pytest.approx(sum(map(bool, passes)) / 3)
    arguments = (
        f"eval {run.path / 'model'} --prompts {folder / 'held-out.jsonl'} --json --max-tokens 9 "
        f"--reward {folder / 'reward.py'} --samples 3 --pass-at 3,1 --pass-threshold 4 --seed 5 "
        f"--samples-out {folder / 'samples.jsonl'}"
    )
    result = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)
    report = json.loads(result.stdout)
    assert report.items() >= after["pass_at_k"].items()
    assert read_samples(folder / "samples.jsonl") == kept
    # Evaluations leave weights and random numbers alone.
    tuning.assert_same(train(folder, short_recipe(), "plain").saved(), run.saved())


@needs_native
@pytest.mark.parametrize(
    ("changes", "steps"), [({}, [0, 1, 2]), ({"temperature": 0.5}, [0, 1, 1, 2])], ids=str
)
def test_a_phase_repeats_no_evaluation(
    folder: Path, changes: dict[str, Any], steps: list[int]
) -> None:
    """The end of a phase is evaluated again if the next one samples in another way."""
    raw = short_recipe(evaluation=HELD_OUT)
    first = raw["phase"][0]
    raw["phase"].append(first | {"grpo": first["grpo"] | changes})
    run = train(folder, raw, f"phases-{len(changes)}")
    assert [record["step"] for record in run.records("evaluation")] == steps


@needs_native
def test_an_unusable_reward_file_is_named_by_its_option(folder: Path) -> None:
    (folder / "none.py").write_text("")
    options = f"--prompts {folder / 'prompts.jsonl'} --reward {folder / 'none.py'} --max-tokens 9"
    result = CliRunner().invoke(app, ["eval", str(folder / "base"), *options.split()])
    assert isinstance(result.exception, UserError)
    assert re.match(r"--reward: .*none\.py: has no function reward", str(result.exception))


@needs_native
@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"pass_at": [4]}, "pass_at: 4 exceeds num_generations 3"),
        ({"prompts": "absent.jsonl"}, "name a JSON Lines file as evaluation.prompts"),
        ({"prompts": "texts.jsonl"}, "evaluation.prompts has texts, grpo.prompts has chats"),
        ({"prompts": "long.jsonl"}, "long.jsonl: line 1: the prompt has .* tokens, and 51 fit"),
    ],
    ids=str,
)
def test_bad_held_out_prompts_are_refused(folder: Path, table: dict[str, Any], said: str) -> None:
    (folder / "texts.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "a" * 52}) + "\n")
    with pytest.raises(UserError, match=said):
        train(folder, short_recipe(evaluation=HELD_OUT | table), "refused")


def test_held_out_prompts_need_a_grpo_phase() -> None:
    raw = tuning.raw_recipe(base_model="base", evaluation={"prompts": "held-out.jsonl"})
    with pytest.raises(UserError, match="prompts are those of grpo phases"):
        parse_recipe(raw, origin="r.toml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "give either --text FILE"),
        ("--text a --prompts b", "give either --text FILE"),
        ("--text a --samples 3", "leave out the options of pass@k"),
        ("--prompts a --window 3", "--window and --expert-loads need --text"),
        ("--prompts a", "--prompts needs --reward NAME"),
        ("--prompts a --reward f", "--reward: 'f' is none of accuracy_reward"),
        ("--prompts a --reward accuracy_reward --pass-at 1,9", "from 1 to the 8 samples"),
        ("--prompts a --reward accuracy_reward --pass-at 0", "from 1 to the 8 samples"),
        ("--prompts a --reward accuracy_reward --pass-at x", "write whole numbers"),
        ("--prompts a --reward accuracy_reward --pass-threshold nan", "must be a finite number"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_read(options: str, said: str) -> None:
    result = CliRunner().invoke(app, ["eval", "absent", *options.split()])
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception) and "\n" not in str(result.exception)


@needs_native
def test_prompts_are_checked_before_weights_are_read(folder: Path) -> None:
    options = f"--prompts {folder / 'held-out.jsonl'} --reward accuracy_reward --max-tokens 9"
    result = CliRunner().invoke(app, ["eval", str(folder / "base"), *options.split()])
    assert "line 1: has no 'answer' or 'solution'" in str(result.exception)
    options = options.replace("accuracy_reward --max-tokens 9", f"{folder / 'reward.py'}")
    result = CliRunner().invoke(app, ["eval", str(folder / "base"), *options.split()])
    assert "lower --max-tokens, or shorten the prompt" in str(result.exception)
