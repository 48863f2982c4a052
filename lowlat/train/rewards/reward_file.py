"""A user's functions in Python files: `reward(prompt, completion, record) -> float`, and
`tool(prompt, completion, record) -> str | None`.
"""

import importlib.util
import inspect
import sys
import traceback
from pathlib import Path

from lowlat.train.rewards.functions import Reward
from lowlat.train.rewards.sample import FunctionName
from lowlat.utils.errors import UserError


def is_file(name: str) -> bool:
    """Whether an entry of reward_funcs is a Python file, not a built-in reward."""
    return name.endswith(".py")


def load_reward_file(path: Path, name: FunctionName = "reward") -> Reward:
    """Run the file, with its folder on the module path, and return its function `name`.

    Raises UserError naming the file if it cannot be run, or lacks a function with this signature.
    """
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # a file can raise anything, SystemExit included
        raise UserError(f"{path}: {_place(error, path)}; correct the file") from error
    function, signature = vars(module).get(name), f"{name}(prompt, completion, record)"
    if not callable(function):
        raise UserError(f"{path}: has no function {signature}; define it")
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError as error:
        found = f"{name}{inspect.signature(function)}"
        raise UserError(f"{path}: {found} must take three arguments: {signature}") from error
    return Reward(
        lambda sample: function(sample.prompt, sample.completion, sample.record),
        is_tool=name == "tool",
    )


def _place(error: BaseException, path: Path) -> str:
    """The error in one line, with its line in the file."""
    if isinstance(error, OSError) and error.filename == str(path):
        return f"cannot be read ({error.strerror})"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())[:200]
    return f"{'' if line is None else f'line {line}: '}{type(error).__name__}: {text}"
