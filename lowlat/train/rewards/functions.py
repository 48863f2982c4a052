"""Built-in reward functions: exact answers (math-verify), reasoning-gym, reasoning format, length,
JSON Schema. Names that TRL has are TRL's.

Each entry of REWARDS imports its library and returns the function.
Only text after the reasoning counts as the answer; reasoning that never ends has none.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lowlat.train.rewards.sample import RewardContext, Sample
from lowlat.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class Reward:
    """A loaded reward function."""

    score: Callable[[Sample], object]
    """Called in a fork for each sample; what it raises or returns is checked there."""
    prepare: Callable[[Sample], object] | None = None
    """Called before in the process that forks, to fill caches. Its errors are those of `score`."""
    is_tool: bool = False
    """Whether it returns the text of a tool message, or None, in place of a number."""


INSTALL = "pip install 'lowlat[rewards]'"
ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
FENCED = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)
GSM8K_ANSWER = "####"

FIELDS: Mapping[str, tuple[str, ...]] = {
    "accuracy_reward": ("answer", "solution"),
    "reasoning_gym_reward": ("reasoning_gym",),
    "json_schema_reward": ("schema",),
}
"""Reward -> the fields of a record of which it needs one."""


def reasoning_and_answer(completion: str, context: RewardContext) -> tuple[str, str] | None:
    """The completion's reasoning and the text after it; None if the tags are not one pair at the
    start, reasoning included.
    """
    opened, closed = context.reasoning_open, context.reasoning_close
    text = completion.strip()
    if not context.is_reasoning_open:
        if not text.startswith(opened):
            return None
        text = text.removeprefix(opened)
    if opened in text or text.count(closed) != 1:
        return None
    reasoning, _, answer = text.partition(closed)
    return reasoning.strip(), answer.strip()


def answer_text(completion: str, context: RewardContext) -> str:
    """The text after the last closing tag; "" for reasoning that never ends."""
    _, is_closed, answer = completion.rpartition(context.reasoning_close)
    is_opened = context.is_reasoning_open or context.reasoning_open in completion
    return "" if is_opened and not is_closed else answer.strip()


def tagged_answer(text: str) -> str:
    """What the last <answer>...</answer> encloses; all of `text` without one."""
    found = ANSWER.findall(text)
    return found[-1] if found else text


def gold_answer(record: Mapping[str, Any]) -> str:
    """The reference answer: in GSM8K's format the number after ####, without commas."""
    answer = record.get("answer")
    gold = str(record["solution"] if answer is None else answer)
    if GSM8K_ANSWER in gold:
        return gold.rpartition(GSM8K_ANSWER)[2].strip().replace(",", "")
    return gold


def think_format_reward(context: RewardContext) -> Reward:
    """1 for reasoning between one pair of tags and then an answer, both not empty; else 0."""

    def score(sample: Sample) -> float:
        parts = reasoning_and_answer(sample.completion, context)
        return float(parts is not None and all(parts))

    return Reward(score)


def length_penalty(context: RewardContext) -> Reward:
    """Minus the completion's share of max_completion_length: 0 to -1."""

    def score(sample: Sample) -> float:
        return -sample.num_tokens / context.max_completion_length

    return Reward(score)


def accuracy_reward(context: RewardContext) -> Reward:
    """1 if math-verify finds the answer equal to the record's `answer` (or `solution`), else 0.

    The completion's answer is a \\boxed or other LaTeX expression, or a number.
    """
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        _missing("accuracy_reward", "math-verify", error)
    # the worker's deadline is the time limit; math-verify's own counts as a wrong answer
    limits: dict[str, Any] = {"parsing_timeout": None, "raise_on_error": True}
    # the first call builds the parser, which every fork then has
    half = math_verify.parse("$\\frac{1}{2}$", **limits)
    math_verify.verify(half, math_verify.parse("It is 0.5.", **limits), timeout_seconds=None)

    def score(sample: Sample) -> float:
        gold = gold_answer(sample.record)
        wanted = math_verify.parse(gold if "$" in gold else f"${gold}$", **limits)
        if not wanted:
            raise ValueError(f"the reference answer {gold[:80]!r} is no expression")
        text = tagged_answer(answer_text(sample.completion, context))
        try:
            found = math_verify.parse(text, **limits)
            is_equal = math_verify.verify(wanted, found, timeout_seconds=None, raise_on_error=True)
        except MemoryError:
            raise
        except Exception:  # as by math-verify's default, an answer that it cannot compare is wrong
            return 0.0
        return float(is_equal)

    return Reward(score)


def reasoning_gym_reward(context: RewardContext) -> Reward:
    """The score of reasoning-gym's task for the text in <answer> tags, or all of the answer."""
    from lowlat.train.rewards.reasoning_gym import entry_of, require

    require("reasoning_gym_reward")

    def score(sample: Sample) -> float:
        dataset, entry = entry_of(sample.record["reasoning_gym"])
        answer = tagged_answer(answer_text(sample.completion, context))
        try:
            return dataset.score_answer(answer=answer, entry=entry)
        except MemoryError:
            raise
        except Exception:  # some tasks raise for an answer that they cannot parse: it is wrong
            return 0.0

    return Reward(score, prepare=lambda sample: entry_of(sample.record["reasoning_gym"]))


def json_schema_reward(context: RewardContext) -> Reward:
    """1 if the answer is one JSON value, plain or in a ``` fence, valid under the record's
    `schema`; else 0. References to other documents are not fetched and raise.
    """
    try:
        import referencing
        from jsonschema.validators import validator_for
    except ImportError as error:
        _missing("json_schema_reward", "jsonschema", error)

    def score(sample: Sample) -> float:
        schema = sample.record["schema"]
        validator = validator_for(schema)
        validator.check_schema(schema)
        text = answer_text(sample.completion, context)
        fenced = FENCED.match(text)
        try:
            value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator(schema, registry=referencing.Registry()).is_valid(value))

    return Reward(score)


REWARDS: Mapping[str, Callable[[RewardContext], Reward]] = {
    "accuracy_reward": accuracy_reward,
    "reasoning_gym_reward": reasoning_gym_reward,
    "think_format_reward": think_format_reward,
    "length_penalty": length_penalty,
    "json_schema_reward": json_schema_reward,
}


def _missing(reward: str, package: str, error: ImportError) -> NoReturn:
    raise UserError(f"{reward} needs {package} ({error}); {INSTALL}") from error


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
