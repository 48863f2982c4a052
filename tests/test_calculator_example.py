"""examples/calculator.py: a tool with bounds, and rollouts of several turns."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lowlat.train.rewards.sample import RewardFailure, Sample
from lowlat.train.rewards.workers import RewardWorkers

SCRIPT = Path(__file__).parents[1] / "examples" / "calculator.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("calculator_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


calculator = load()


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(16 - 3 - 4) * 2", 18.0),
        (" 7 / 2 ", 3.5),
        ("7 // 2 + 7 % 4", 6.0),
        ("-2 ** 10", -1024.0),
        ("2 ** 0.5", 2**0.5),
        ("1e3 - .5", 999.5),
    ],
)
def test_calculations(expression: str, value: float) -> None:
    assert calculator.calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "(1).real",
        "[1][0]",
        "'a' * 3",
        "True + 1",
        "1 if 1 else 2",
        "9 ** 9 ** 9",
        "2 ** -5000",
        "(-8) ** 0.5",
        "1j * 1j",
        "9" * 201,
        "1 << 4",
        "",
        "1 +",
    ],
)
def test_refused_expressions(expression: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        calculator.calculate(expression)


@dataclass
class Text:
    text: str


class ScriptedModel:
    """Answers each chat by its number of messages."""

    def generate_many(self, chats: list[list[dict[str, str]]], **options: Any) -> list[list[Text]]:
        assert options == {"stop": "</calculator>", "temperature": 0.5}
        return [[Text(self.next(chat))] for chat in chats]

    def next(self, chat: list[dict[str, str]]) -> str:
        question, last = chat[0]["content"], chat[-1]["content"]
        if question == "loop":
            return "again <calculator>1/0"
        if question == "plain":
            return "It is <answer>4</answer>."
        steps = {1: "First <calculator>(16-3-4)", 3: f"{last}. <calculator>9*2"}
        return steps.get(len(chat), f"So <answer>{last.removeprefix('Result: ')}</answer>")


def test_several_turns() -> None:
    prompts = [[{"role": "user", "content": name}] for name in ("eggs", "plain", "loop")]
    with RewardWorkers([str(SCRIPT)]) as tool:
        found = calculator.rollouts(ScriptedModel(), prompts, tool, turns=3, temperature=0.5)
        assert tool.score([Sample("", "1/0", {})]) == [
            [RewardFailure(str(SCRIPT), "raised", "ZeroDivisionError: division by zero")]
        ]
    contents = [[message["content"] for message in chat] for chat in found]
    assert contents[0] == [
        "eggs",
        "First <calculator>(16-3-4)</calculator>",
        "Result: 9",
        "Result: 9. <calculator>9*2</calculator>",
        "Result: 18",
        "So <answer>18</answer>",
    ]
    assert contents[1] == ["plain", "It is <answer>4</answer>."]
    assert contents[2][2::2] == ["Result: error: ZeroDivisionError: division by zero"] * 3
    assert [message["role"] for message in found[0]] == ["user", "assistant"] * 3
