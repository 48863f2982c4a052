"""examples/calculator.py: a tool with bounds on what it computes."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from lowlat.train.rewards.sample import Sample
from lowlat.train.rewards.workers import ToolWorkers

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


def test_turns_that_end_with_a_call_get_its_value() -> None:
    turns = {
        "First <calculator>(16-3-4)*2</calculator>": "18",
        "<calculator>1</calculator> or <calculator>7 / 2</calculator>\n": "3.5",
        "<calculator>1/0</calculator>": "error: division by zero",
        "<calculator>9 ** 9 ** 9</calculator>": "error: the power is too large",
        "<calculator>1 +</calculator>": "error: invalid syntax (<unknown>, line 1)",
        "It is <answer>4</answer>.": None,
        "<calculator>1+1</calculator> is <answer>2</answer>": None,
        "<calculator>1+1": None,
    }
    workers = ToolWorkers(str(SCRIPT))
    try:
        found = workers.score([Sample([], turn, {}) for turn in turns])
    finally:
        workers.close()
    assert [answer for (answer,) in found] == list(turns.values())
