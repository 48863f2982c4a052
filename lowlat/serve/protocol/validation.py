"""From a parsed JSON object to a model: pydantic's many errors become one line and a path.

Owns the wording and the path (`messages[0].content`) in `param`.
"""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lowlat.serve.protocol.failure import RequestError

MAX_MESSAGE = 400
MAX_PARAM = 200

Body = TypeVar("Body", bound=BaseModel)
Path = tuple[str | int, ...]


def validate(kind: type[Body], value: dict[str, Any]) -> Body:
    """`value` as a `kind`. Raises RequestError that names the field."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        found = [(item, _path(item, value)) for item in details]
        item, path = max(found, key=lambda pair: _rank(*pair))
        raise _failure(item, path) from None


def _failure(item: ErrorDetails, path: Path) -> RequestError:
    name = _spell(path)
    if item["type"] == "missing":
        message = f"{name} is missing"
    elif item["type"] == "extra_forbidden":
        message = f"{name} is not supported; leave it out"
    else:
        message = f"{name}: {item['msg'][:1].lower()}{item['msg'][1:]}"
    return RequestError(_one_line(message, MAX_MESSAGE), param=_one_line(name, MAX_PARAM))


def _rank(item: ErrorDetails, path: Path) -> tuple[int, int]:
    """How much an error tells: most, that an object is of an unknown type; least, that a value is
    of another type than one branch of a union takes. Of equals the one furthest inside.
    """
    if item["type"] == "literal_error" and path[-1:] == ("type",):
        return 2, len(path)
    is_type = item["type"].endswith("_type") or item["type"] == "literal_error"
    return (0 if is_type else 1), len(path)


def _path(item: ErrorDetails, value: object) -> Path:
    """The part of pydantic's location that is in the body; names of union branches are not."""
    path: list[str | int] = []
    for step in item["loc"]:
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            continue
        path.append(step)
    if item["type"] == "missing":
        path.append(item["loc"][-1])
    return tuple(path)


def _spell(path: Path) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")


def _one_line(text: str, length: int) -> str:
    line = "".join(char if char.isprintable() else "?" for char in text[: length + 1])
    return line if len(line) <= length else line[: length - 3] + "..."
