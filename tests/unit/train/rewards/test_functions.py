"""Built-in rewards, in their worker process, against math-verify and jsonschema's own verdicts."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from lowlat.train.rewards.context import reward_context
from lowlat.train.rewards.functions import FIELDS, REWARDS
from lowlat.train.rewards.records import check_fields, prompt_of
from lowlat.train.rewards.sample import RewardContext, RewardFailure, Sample, Score
from lowlat.train.rewards.workers import RewardWorkers
from lowlat.utils.errors import UserError
from tests.fakes import byte_tokenizer

GSM8K = os.environ.get("LOWLAT_TEST_GSM8K")
OPENED = RewardContext(is_reasoning_open=True)
OTHER_TAGS = RewardContext(reasoning_open="[THINK]", reasoning_close="[/THINK]")


def scores(name: str, samples: Sequence[Sample], context: RewardContext) -> list[Score]:
    reward = REWARDS[name](context)
    return [float(reward.score(sample)) for sample in samples]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "context", "score"),
    [
        ("<think>a</think>b", RewardContext(), 1.0),
        ("\n<think>\na\n</think>\n\nb\n", RewardContext(), 1.0),
        ("a</think>b", RewardContext(), 0.0),
        ("a</think>b", OPENED, 1.0),
        ("<think>a</think>b", OPENED, 0.0),
        ("<think>a</think>", RewardContext(), 0.0),
        ("<think> </think>b", RewardContext(), 0.0),
        ("<think>a", RewardContext(), 0.0),
        ("x<think>a</think>b", RewardContext(), 0.0),
        ("<think>a</think>b</think>c", RewardContext(), 0.0),
        ("<think>a<think>b</think>c", RewardContext(), 0.0),
        ("[THINK]a[/THINK]b", OTHER_TAGS, 1.0),
        ("", RewardContext(), 0.0),
    ],
)
def test_think_format(completion: str, context: RewardContext, score: float) -> None:
    assert scores("think_format_reward", [Sample("", completion, {})], context) == [score]


@pytest.mark.parametrize(("num_tokens", "score"), [(0, 0.0), (3, -0.25), (12, -1.0)])
def test_length_penalty(num_tokens: int, score: float) -> None:
    context = RewardContext(max_completion_length=12)
    assert scores("length_penalty", [Sample("", "", {}, num_tokens)], context) == [score]


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        ("She has 2+2=<<2+2=4>>4.\n#### 4", "The answer is 4.", 1.0),
        ("#### 1,450,000", "so \\boxed{1450000}", 1.0),
        ("#### 1,450,000", "#### 1,450,000", 1.0),
        ("#### 18", "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18", 1.0),
        ("#### 18", "#### 17", 0.0),
        ("#### 18", "18 at first, then #### 17", 0.0),
        ("#### -5", "The change is $-5$.", 1.0),
        ("#### 60", "She makes $60", 1.0),
        ("#### 60", "<answer>60</answer>", 1.0),
        ("#### 60", "<answer>61</answer> no, <answer>60</answer>", 1.0),
        ("#### 60", "<think>60</think> It is 61.", 0.0),
        ("#### 60", "<think>61</think> It is 60.", 1.0),
        ("#### 60", "<think>It is 60", 0.0),
        ("#### 60", "no number", 0.0),
        ("#### 60", "", 0.0),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("$\\sqrt{8}$", "It is $2\\sqrt{2}$.", 1.0),
        ("1/3", "$\\frac{2}{6}$", 1.0),
        ("x^2+2x", "$x(x+2)$", 1.0),
        ("x^2+2x", "$x(x-2)$", 0.0),
    ],
)
def test_accuracy(answer: str, completion: str, score: float) -> None:
    context = RewardContext()
    assert scores("accuracy_reward", [Sample("", completion, {"answer": answer})], context) == [
        score
    ]
    renamed = Sample("", completion, {"answer": None, "solution": answer})
    assert scores("accuracy_reward", [renamed], context) == [score]


def test_answers_of_gsm8k() -> None:
    """A tenth of a split: each solution is right, and wrong for another answer."""
    if GSM8K is None:
        pytest.skip("LOWLAT_TEST_GSM8K does not name a file of GSM8K, such as gsm8k-test.jsonl")
    records = [json.loads(line) for line in Path(GSM8K).read_text().splitlines()][::10]
    right = [Sample(prompt_of(r, ""), r["answer"], r) for r in records]
    assert set(scores("accuracy_reward", right, RewardContext())) == {1.0}
    final = [r["answer"].partition("####")[2].strip() for r in records]
    shifted = [
        Sample("", f"The answer is {a}.", r) for a, r in zip(final[1:], records, strict=False)
    ]
    expected = [float(a == b) for a, b in zip(final[1:], final, strict=False)]
    assert scores("accuracy_reward", shifted, RewardContext()) == expected


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
}


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ('{"age": 3}', 1.0),
        ('```json\n{"age": 3}\n```', 1.0),
        ('<think>{"age": -1}</think>\n{"age": 3}', 1.0),
        ('{"age": -3}', 0.0),
        ("{}", 0.0),
        ('{"age": 3} {"age": 3}', 0.0),
        ('The object is {"age": 3}', 0.0),
        ('{"age": NaN}', 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_json_schema(completion: str, score: float) -> None:
    sample = Sample("", completion, {"schema": SCHEMA})
    assert scores("json_schema_reward", [sample], RewardContext()) == [score]


def test_schemas_fetch_nothing_and_bad_ones_are_named() -> None:
    """A pattern that backtracks for ages, a remote reference, and a schema that is none."""
    slow = {"type": "string", "pattern": "^(a+)+$"}
    samples = [
        Sample("", json.dumps("a" * 40 + "!"), {"schema": slow}),
        Sample("", "1", {"schema": {"$ref": "http://localhost:9/schema.json"}}),
        Sample("", "1", {"schema": {"type": "number?"}}),
        Sample("", "1", {"schema": {"type": "number"}}),
    ]
    with RewardWorkers(["json_schema_reward"], seconds=1.0) as workers:
        found = [score for (score,) in workers.score(samples)]
    assert found[3] == 1.0
    kinds = [score.kind for score in found[:3] if isinstance(score, RewardFailure)]
    assert kinds == ["timed out", "raised", "raised"]


def test_prompts() -> None:
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+2?"}]
    assert prompt_of({"prompt": "2+2="}, "x") == "2+2="
    assert prompt_of({"prompt": chat, "question": "other", "answer": "4"}, "x") == chat
    assert prompt_of({"question": "2+2?", "answer": "#### 4"}, "x") == chat[1:]
    for bad in ({}, {"prompt": ""}, {"prompt": []}, {"prompt": ["a"]}, {"question": "2+2?"}):
        with pytest.raises(UserError, match=r"^f\.jsonl: line 3: 'prompt' must be a text, or"):
            prompt_of(bad, "f.jsonl: line 3")


def test_missing_fields_name_the_reward() -> None:
    every = ["think_format_reward", *FIELDS, "mine.py"]
    record = {"answer": "4", "reasoning_gym": {}, "schema": {}}
    check_fields(record, "x", every)
    check_fields({}, "x", ["think_format_reward", "length_penalty", "mine.py"])
    with pytest.raises(UserError) as caught:
        check_fields(record | {"answer": None}, "f.jsonl: line 3", every)
    assert str(caught.value) == (
        "f.jsonl: line 3: has no 'answer' or 'solution', which accuracy_reward needs; add it, or"
        " remove the reward"
    )


@pytest.mark.parametrize(
    ("tail", "context"),
    [
        ("", RewardContext(max_completion_length=7)),
        ("<think>\\n", RewardContext(max_completion_length=7, is_reasoning_open=True)),
    ],
)
def test_context_of_a_chat_template(tail: str, context: RewardContext) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '" + tail + "' }}"
    tokenizer = byte_tokenizer(source)
    assert reward_context(tokenizer, max_completion_length=7) == context
    texts = reward_context(tokenizer, max_completion_length=7, are_chats=False)
    assert texts == RewardContext(max_completion_length=7)


def test_context_with_other_tags() -> None:
    source = "{{ messages[0].content.split('[/THINK]')[-1] }}[THINK]"
    context = reward_context(byte_tokenizer(source), max_completion_length=512)
    assert context == dataclasses.replace(OTHER_TAGS, is_reasoning_open=True)
    assert reward_context(byte_tokenizer(None), max_completion_length=512) == RewardContext()
