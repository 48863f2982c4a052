"""Validation errors of recipes as one line: the key, its value, and a valid value."""

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

UNKNOWN = "extra_forbidden"
NUMBER, SEGMENTS = "number", "segments"
"""Kinds of schedules, which pydantic adds to the path of a key."""
SCHEDULE = "must be a number, or segments such as [{ to = 1e-3, steps = 100 }]"
LISTS = {"betas": "a list of two numbers", "target_modules": "a list of names"}
NAME = "must be letters, digits, '.', '_' and '-', a letter or digit first"
LONGEST_VALUE = 40
"""Longest value, in characters, that an error quotes."""


def explain(error: ValidationError, table: type[BaseModel]) -> str:
    """The first error of validating a recipe as `table`, and the number of further errors.

    Unknown keys precede missing keys: an unknown key may be a misspelling of a missing one.
    """
    errors = error.errors()
    first = min(errors, key=lambda found: found["type"] != UNKNOWN)
    path = [part for part in first["loc"] if part not in (NUMBER, SEGMENTS)]
    key = ".".join(map(str, path))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(path[-1]), _keys(table, path[:-1]), 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            return f"{key} is not a key of recipes{meant}{more}"
        case "missing":
            return f"{key} is missing{more}"
    return f"{key}{': ' if key else ''}{_reason(first)}{more}"


def _reason(found: Any) -> str:
    """The valid values of a key."""
    if found["type"] == "value_error":
        return found["msg"].removeprefix("Value error, ")
    if found["type"] == "string_pattern_mismatch":
        return f"{NAME}{_not(found)}"
    if found["type"] == "tuple_type":
        return f"must be {LISTS.get(str(found['loc'][-1]), 'a list')}{_not(found)}"
    if found["type"] == "too_short":
        return f"must have {found['ctx']['min_length']} entries or more"
    if found["loc"][-1:] == (NUMBER,) and found["type"].endswith("_type"):
        return f"{SCHEDULE}{_not(found)}"
    for words in ("Input should be ", "Field "):
        if found["msg"].startswith(words):
            return f"must be {found['msg'].removeprefix(words)}{_not(found)}"
    return found["msg"]


def _not(found: Any) -> str:
    value = repr(found["input"])
    return f", not {value}" if len(value) <= LONGEST_VALUE else ""


def _keys(table: type[BaseModel], path: list[int | str]) -> list[str]:
    """The keys of the table at `path`."""
    for part in path:
        if isinstance(part, int):
            continue
        inner = list(_tables(table.model_fields[part].annotation))
        if not inner:
            return []
        table = inner[0]
    return list(table.model_fields)


def _tables(annotation: Any) -> Iterable[type[BaseModel]]:
    """Table classes inside the type of a key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _tables(part)
