"""Generator of docs/recipe-reference.md: the keys of recipes, from the docstrings of their fields.

A test compares the page with this output.
"""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lowlat.train.recipe.schema import Recipe, Schedule, Segment

PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text", dict: "table"}


def reference() -> str:
    """Markdown: a heading and a table of keys for the recipe, each of its tables, and segments."""
    sections: dict[type[BaseModel], str] = {}
    for heading, table in [*_tables("", Recipe), ("Segments of schedules", Segment)]:
        sections.setdefault(table, heading)
    return "\n".join(line for table, name in sections.items() for line in _lines(name, table))


def _tables(name: str, table: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """`table` and its inner tables, each with its heading."""
    yield f"`[{name}]`" if name else "At the top", table
    for key, field in table.model_fields.items():
        below = f"{name}.{key}" if name else key
        for inner in _inner(field.annotation):
            yield from _tables(
                f"[{below}]" if get_origin(field.annotation) is list else below, inner
            )


def _lines(name: str, table: type[BaseModel]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield _flat(table.__doc__)
    yield ""
    yield "| key | value | default | |"
    yield "|---|---|---|---|"
    for key, field in table.model_fields.items():
        yield f"| `{key}` | {_value(field)} | {_default(field)} | {_flat(field.description)} |"
    yield ""


def _inner(annotation: Any) -> Iterator[type[BaseModel]]:
    if annotation == Schedule:
        return
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _inner(part)


def _value(field: FieldInfo) -> str:
    return "table" if [*_inner(field.annotation)] else _kind(field.annotation)


def _kind(annotation: Any) -> str:
    """The type of a value in words."""
    if annotation == Schedule:
        return "number or segments"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in parts if part is not type(None))
    if origin is tuple:
        return "list of " + ("texts" if str in parts else "numbers")
    return PLAIN[origin or annotation]


def _default(field: FieldInfo) -> str:
    match field.default:
        case _ if field.is_required():
            return "required"
        case None:
            return "-"
        case BaseModel():
            return "as below"
        case bool() as value:
            return f"`{str(value).lower()}`"
        case tuple() as values:
            return ", ".join(f"`{value}`" for value in values)
        case value:
            return f"`{value}`"


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())
