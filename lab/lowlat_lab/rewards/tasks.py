"""Tasks of the GRPO study: prompts for training and for held-out evaluation, solved examples for
supervised fine-tuning.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lowlat.train.rewards.reasoning_gym import generate
from lowlat.utils.atomic_files import replace_file
from lowlat.utils.errors import UserError

GSM8K = {"prompts.jsonl": "gsm8k-train.jsonl", "held-out.jsonl": "gsm8k-test.jsonl"}
"""Files of GSM8K by what is made of them."""
PROMPTS, HELD_OUT, CHATS = "prompts.jsonl", "held-out.jsonl", "chats.jsonl"
EXACT, NUMBER = "exact.py", "number.py"
REWARD_FILES = {
    EXACT: '''"""1 for the exact answer, 0 for answers that contain it."""

import re


def reward(prompt, completion, record) -> float:
    found = re.findall(r"<answer>(.*?)</answer>", completion)
    return float((found[-1] if found else completion).strip() == record["answer"])
''',
    NUMBER: '''"""1 for a completion that ends with the answer, not with a sum of the same value."""

import re


def reward(prompt, completion, record) -> float:
    found = re.search(r"(?:^|=|[A-Za-z:])\\s*(-?[0-9]+)[.]?$", completion.strip())
    return float(found is not None and found[1] == record["answer"])
''',
}
"""Reward functions that give no credit for an answer that contains the right one."""
SEEDS = {HELD_OUT: 1 << 28, PROMPTS: 2 << 28, CHATS: 3 << 28}
"""First entry of each file: reasoning-gym makes entry i from seed + i."""
SIZES = {PROMPTS: 320, CHATS: 3500}

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTask:
    """A source of prompts whose answers a reward function checks."""

    name: str
    label: str
    """What is asked, for the page."""
    reward: str
    """Name of the reward function, or of its file."""
    sequence_length: int
    """Most tokens of prompt and completion."""
    max_completion_length: int
    dataset: str | None = None
    """reasoning-gym's task; None: `name`."""
    settings: Mapping[str, Any] | None = None
    """Of reasoning-gym's task; None: GSM8K."""
    solution: Callable[[Record], str] | None = None
    """Completion of a solved example; None: no model is fine-tuned on the task."""


def some_reasoning(record: Record) -> str:
    """Solution of a chain_sum: the answer in tags, in every second example after reasoning, one
    term after another.
    """
    answer = f"<answer>{record['answer']}</answer>"
    if record["reasoning_gym"]["index"] % 2:
        return answer
    found = re.search(r": (.*) =$", record["prompt"][-1]["content"])
    assert found is not None
    first, *rest = found[1].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {after}")
        total = after
    return f"{', '.join(steps)}. {answer}"


TASKS = {
    task.name: task
    for task in (
        RewardTask(
            name="chain_sum",
            label="sums and differences of 3 numbers of 1 digit",
            reward=EXACT,
            sequence_length=80,
            max_completion_length=36,
            settings={"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
            solution=some_reasoning,
        ),
        RewardTask(
            name="two_term_sum",
            label="sum or difference of 2 numbers of 1 digit",
            reward=NUMBER,
            sequence_length=112,
            max_completion_length=32,
            dataset="chain_sum",
            settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        ),
        RewardTask(
            name="letter_counting",
            label="how often a letter occurs in 5 to 15 words",
            reward=EXACT,
            sequence_length=128,
            max_completion_length=4,
            settings={},
            solution=lambda record: record["answer"],
        ),
        RewardTask(
            name="gcd",
            label="greatest common divisor of 2 numbers up to 1000",
            reward=EXACT,
            sequence_length=96,
            max_completion_length=6,
            settings={},
            solution=lambda record: record["answer"],
        ),
        RewardTask(
            name="gsm8k",
            label="GSM8K",
            reward="accuracy_reward",
            sequence_length=448,
            max_completion_length=192,
        ),
    )
}


def write_files(task: RewardTask, folder: Path, *, num_held_out: int) -> None:
    """Write the files of a reasoning-gym task, unless they exist. No question of `num_held_out`
    held-out prompts is in another file.
    """
    seeds = {name: seed for name, seed in SEEDS.items() if task.solution or name != CHATS}
    if all((folder / name).exists() for name in seeds):
        return
    sizes = {HELD_OUT: num_held_out, **SIZES}
    configs = [
        (task.dataset or task.name, dict(task.settings or {}, seed=seed, size=sizes[name]))
        for name, seed in seeds.items()
    ]
    for name, text in REWARD_FILES.items():
        replace_file(folder / name, text.encode())
    held_out: set[str] = set()
    for name, records in zip(seeds, generate(configs), strict=True):
        if isinstance(records, UserError):
            raise records
        unique = {_question(own): own for own in records if _question(own) not in held_out}
        if name == HELD_OUT:
            held_out = set(unique)
        lines = map(json.dumps, _chats(task, unique) if name == CHATS else unique.values())
        replace_file(folder / name, "".join(f"{line}\n" for line in lines).encode())


def write_gsm8k(source: Path, folder: Path, *, num_held_out: int) -> None:
    """Write GSM8K's training questions, and its first `num_held_out` test questions as held-out
    prompts. Raises UserError if a file of `source` is missing.
    """
    for name, original in GSM8K.items():
        try:
            with open(source / original, "rb") as file:
                lines = list(islice(file, num_held_out if name == HELD_OUT else None))
        except OSError as error:
            raise UserError(
                f"--gsm8k: {source / original} cannot be read ({error.strerror})"
            ) from error
        replace_file(folder / name, b"".join(lines))


def _question(record: Record) -> str:
    return record["prompt"][-1]["content"]


def _chats(task: RewardTask, records: Mapping[str, Record]) -> Iterator[Record]:
    assert task.solution is not None
    for record in records.values():
        answer = {"role": "assistant", "content": task.solution(record)}
        yield {"messages": [*record["prompt"], answer]}
