"""reasoning-gym: every task's prompts, made again elsewhere, and its own scores of answers."""

import json
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from lowlat.train.rewards.interpreter import environment
from lowlat.train.rewards.reasoning_gym import generate, write_records
from lowlat.train.rewards.sample import RewardFailure, Sample
from lowlat.train.rewards.workers import RewardWorkers
from lowlat.utils.errors import UserError

WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks with several right answers, of which the library gives none."""
LENIENT = {"game_of_life_halting"}
"""Tasks that accept any text without a certain word."""
MIXED = {"composite"}
"""A mixture of the others."""


@pytest.fixture(scope="module")
def names() -> list[str]:
    source = Path(find_spec("reasoning_gym").origin)  # type: ignore
    found = {
        match
        for path in source.parent.rglob("*.py")
        for match in re.findall(r"^DATASET_NAME = \"(\w+)\"", path.read_text(), re.MULTILINE)
    }
    return sorted(found - MIXED)


@pytest.fixture(scope="module")
def workers() -> Iterator[RewardWorkers]:
    with RewardWorkers(["reasoning_gym_reward"], seconds=120.0) as running:
        yield running


def check(names: Sequence[str], workers: RewardWorkers) -> None:
    """The answer of an entry has the score 1; no other one, in a worker's own entry."""
    made = generate([(name, {"seed": 11, "size": 2}) for name in names])
    records = [records[1] for records in made if not isinstance(records, UserError)]
    assert len(records) == len(names)
    right = [Sample(r["prompt"], f"So <answer>{r['answer']}</answer>", r) for r in records]
    wrong = [Sample(r["prompt"], "<answer>no such answer</answer>", r) for r in records]
    found = [score for (score,) in workers.score([*right, *wrong])]
    scores = dict(zip(names, found, strict=False))
    assert {name for name in names if scores[name] != 1.0} == WITHOUT_ANSWER & set(names)
    wrong_scores = dict(zip(names, found[len(names) :], strict=True))
    assert not [score for score in found if isinstance(score, RewardFailure)]
    assert {name for name in names if wrong_scores[name] > 0.5} == LENIENT & set(names)  # type: ignore


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_task_scores_its_own_answer(
    names: list[str], workers: RewardWorkers, part: int
) -> None:
    assert len(names) >= 105
    check(names[part::4], workers)


@pytest.mark.slow
def test_files_of_prompts(tmp_path: Path) -> None:
    """The same bytes each time; other seeds and forms of the prompt."""
    first, again, other = (tmp_path / f"{name}.jsonl" for name in ("a", "b", "c"))
    config = {"seed": 1, "size": 3, "min_terms": 2, "max_terms": 2}
    write_records(first, "chain_sum", config, system_prompt="Think.")
    write_records(again, "chain_sum", config, system_prompt="Think.")
    assert first.read_bytes() == again.read_bytes()
    write_records(other, "chain_sum", config | {"seed": 2}, system_prompt="Sum.", is_text=True)
    records, others = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (first, other)
    )
    assert len(records) == len({record["answer"] for record in records}) == 3
    assert records[0]["prompt"][0] == {"role": "system", "content": "Think."}
    assert records[0]["prompt"][1]["role"] == "user" and len(records[0]["prompt"]) == 2
    assert others[0]["prompt"].startswith("Sum.\n") and others[0]["prompt"].endswith("\n")
    assert not {each["answer"] for each in others} & {each["answer"] for each in records}


@pytest.mark.slow
def test_unknown_tasks_and_settings_are_one_line() -> None:
    tasks = [
        ("chain_sums", {}),
        ("chain_sum", {"terms": 2}),
        ("chain_sum", {"min_terms": 3, "max_terms": 2}),
    ]
    errors = [str(error) for error in generate([(t, {"size": 2} | c) for t, c in tasks])]
    assert errors[0].startswith("reasoning-gym has no task 'chain_sums'; did you mean chain_sum")
    assert errors[1].startswith("reasoning-gym task chain_sum: ") and "'terms'" in errors[1]
    assert errors[2].startswith("reasoning-gym task chain_sum: ")
    assert "\n" not in "".join(errors)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError('No module named reasoning_gym')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{environment().get('PYTHONPATH', '')}")
    with pytest.raises(UserError, match=r"needs reasoning-gym .*; pip install 'lowlat\[rewards\]'"):
        write_records(tmp_path / "prompts.jsonl", "gcd", {"seed": 0, "size": 1})
    with pytest.raises(UserError, match=r"^reward_funcs: reasoning_gym_reward needs reasoning-gym"):
        RewardWorkers(["reasoning_gym_reward"])
