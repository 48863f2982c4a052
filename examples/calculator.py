"""Rollouts of several turns with a tool: the model asks a calculator, accuracy_reward scores the
last answer.

    python examples/calculator.py MODEL gsm8k-test.jsonl --prompts 8

The calculator is a reward function of this file, `reward`, so it runs in a process of its own with
limits on time and memory; an expression that fails is an error for the model, never for the run.
"""

import argparse
import ast
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lowlat
from lowlat.train.rewards.records import check_fields, prompt_of
from lowlat.train.rewards.sample import RewardFailure, Sample, Score
from lowlat.train.rewards.workers import RewardWorkers

OPEN, CLOSE = "<calculator>", "</calculator>"
SYSTEM = (
    f"Solve the problem step by step. To calculate, write {OPEN}(16-3-4)*2{CLOSE} and wait for the "
    "result. End with the answer in <answer></answer>."
)
LONGEST, LARGEST_BITS = 200, 1024
OPERATIONS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}

Chat = list[dict[str, str]]


def calculate(expression: str) -> float:
    """The value of an arithmetic expression: numbers, parentheses, + - * / // % **.

    Raises ValueError for anything else, a long expression or a large power.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"more than {LONGEST} characters")
    return float(_value(ast.parse(expression.strip(), mode="eval").body))


def _value(node: ast.AST) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATIONS:
            return OPERATIONS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            first, second = _value(left), _value(right)
            if isinstance(op, ast.Pow):
                _check_power(first, second)
            return OPERATIONS[type(op)](first, second)
    raise ValueError("only numbers and + - * / // % ** ( )")


def _check_power(base: float, exponent: float) -> None:
    if abs(exponent) > LARGEST_BITS or int(abs(base)).bit_length() * abs(exponent) > LARGEST_BITS:
        raise ValueError("the power is too large")
    if base < 0 and exponent != int(exponent):
        raise ValueError("the power is not real")


def reward(prompt: object, completion: str, record: object) -> float:
    """The tool as a reward function: the "completion" is the expression."""
    return calculate(completion)


def called(text: str) -> str | None:
    """The expression of a turn that ends with a call; CLOSE stops it and is not part of `text`."""
    _, is_call, expression = text.rpartition(OPEN)
    return expression if is_call else None


def shown(result: Score) -> str:
    """A result, or an error, for the model."""
    return f"error: {result.detail}" if isinstance(result, RewardFailure) else f"{result:.10g}"


def rollouts(
    model: lowlat.Model, prompts: Sequence[Chat], tool: RewardWorkers, *, turns: int, **options: Any
) -> list[Chat]:
    """Continue each chat until a turn calls no tool, `turns` turns at most; a batch per turn."""
    chats = [list(prompt) for prompt in prompts]
    active = list(range(len(chats)))
    for _ in range(turns):
        groups = model.generate_many([chats[i] for i in active], stop=CLOSE, **options)
        texts = [completion.text for (completion,) in groups]
        calls = {i: called(text) for i, text in zip(active, texts, strict=True)}
        for i, text in zip(active, texts, strict=True):
            end = "" if calls[i] is None else CLOSE
            chats[i].append({"role": "assistant", "content": f"{text}{end}"})
        active = [i for i in active if calls[i] is not None]
        results = tool.score([Sample("", calls[i] or "", {}) for i in active])
        for i, (result,) in zip(active, results, strict=True):
            chats[i].append({"role": "user", "content": f"Result: {shown(result)}"})
        if not active:
            break
    return chats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6)
    arguments = parser.parse_args()
    lines = arguments.file.read_text().splitlines()[: arguments.prompts]
    records = [json.loads(line) for line in lines]
    for number, record in enumerate(records, 1):
        check_fields(record, f"{arguments.file}: line {number}", ["accuracy_reward"])
    prompts = [
        [{"role": "system", "content": SYSTEM}, *prompt_of(record, str(arguments.file))]
        for record in records
    ]
    with RewardWorkers([__file__], seconds=5.0) as tool, RewardWorkers(["accuracy_reward"]) as end:
        model = lowlat.load(arguments.model)
        chats = rollouts(
            model, prompts, tool, turns=arguments.turns, temperature=0.0, max_tokens=256
        )
        samples = [
            Sample(chat, chat[-1]["content"], record)
            for chat, record in zip(chats, records, strict=True)
        ]
        for chat, (score,) in zip(chats, end.score(samples), strict=True):
            for message in chat[1:]:
                print(f"{message['role']}: {message['content']}")
            print(f"score: {score}\n")


if __name__ == "__main__":
    main()
