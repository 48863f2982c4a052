"""A calculator as the tool of GRPO rollouts: a turn that ends with a call gets the value as a tool
message, and the model continues.

    [phase.grpo]
    tool = "examples/calculator.py"

lowlat calls `tool` in a process of its own with limits on time and memory. An expression that fails
is an error for the model. Prompts must explain the call (recipes/calculator.toml).
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

CALL = re.compile(r"<calculator>([^<>]*)</calculator>\s*\Z")
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


def tool(prompt: object, completion: str, record: object) -> str | None:
    """The value of the call that ends a turn, or its error; None without a call."""
    call = CALL.search(completion)
    if call is None:
        return None
    try:
        return f"{calculate(call[1]):.10g}"
    except (ValueError, SyntaxError, ArithmeticError, RecursionError) as error:
        return f"error: {error}"
