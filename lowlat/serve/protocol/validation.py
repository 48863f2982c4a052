"""Validation of request bodies: the most relevant of pydantic's errors, in one line, with the path.

The path (`messages[0].content`) becomes the error's `param`.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lowlat.serve.protocol.base import StrictModel
from lowlat.serve.protocol.errors import RequestError

MAX_MESSAGE = 400
MAX_PARAM = 200
VISION_PARTS = ("image", "image_url", "image_embeds", "input_image", "video", "video_url")
"""Types of content parts that only multimodal models understand."""
UNKNOWN_KIND = "unknown_kind"
"""Error type of a union with a custom discriminator on the field `type`."""

Body = TypeVar("Body", bound=StrictModel)
Path = tuple[str | int, ...]


def validate(kind: type[Body], value: dict[str, Any]) -> Body:
    """`value` as a `kind`. Raises RequestError about the first invalid field."""
    unset = {name for name in kind.UNSUPPORTED & value.keys() if value[name] is None}
    try:
        return kind.model_validate({name: value[name] for name in value if name not in unset})
    except ValidationError as error:
        details = error.errors(include_url=False)
        found = [(item, _path(item, value)) for item in details]
        item, path = max(found, key=lambda pair: _rank(*pair))
        raise _failure(item, path) from None


def _failure(item: ErrorDetails, path: Path) -> RequestError:
    name = _spell(path) or "the body"
    if item["type"] in ("missing", "union_tag_not_found"):
        message = f"{name} is missing"
    elif item["type"] == "extra_forbidden":
        message = f"{name} is not supported; leave it out"
    elif item["type"] == "union_tag_invalid":
        context = item.get("ctx", {})
        message = f"{name} must be one of {context['expected_tags']}, got {context['tag']!r}"
    else:
        message = f"{name}: {item['msg'][:1].lower()}{item['msg'][1:]}"
        if path[-1:] == ("type",) and item["input"] in VISION_PARTS:
            message += f"; {item['input']} needs a vision tower, and lowlat loads none: send text"
    param = one_line(name, MAX_PARAM) if path else None
    return RequestError(one_line(message, MAX_MESSAGE), param=param)


def _rank(item: ErrorDetails, path: Path) -> tuple[int, int]:
    """Relevance of an error: an unknown `type` ranks highest, a type mismatch lowest, because other
    branches of a union also report it. Of equals, the deepest wins.
    """
    if item["type"] == "literal_error" and path[-1:] == ("type",):
        return 2, len(path)
    is_type = item["type"].endswith("_type") or item["type"] == "literal_error"
    return (0 if is_type else 1), len(path)


def _path(item: ErrorDetails, value: object) -> Path:
    """Pydantic's location without the names of union branches, as a path into the body."""
    location = item["loc"]
    # A union branch and a field of its object may share a name (`json_schema`).
    path = max(_readings(location, value), key=lambda read: (len(read), read[-1:] == location[-1:]))
    if item["type"] == "missing":
        return (*path, location[-1])
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return (*path, item.get("ctx", {})["discriminator"].strip("'"))
    is_unknown = item["type"] == UNKNOWN_KIND and isinstance(item["input"], dict)
    return (*path, "type") if is_unknown else path


def _readings(location: Path, value: object) -> Iterator[Path]:
    """Every interpretation of `location` as steps into `value`."""
    if not location:
        yield ()
        return
    step, rest = location[0], location[1:]
    is_branch = True
    if isinstance(value, dict) and step in value:
        yield from ((step, *read) for read in _readings(rest, value[step]))
        is_branch = step == value.get("type")
    elif isinstance(value, list) and isinstance(step, int) and step < len(value):
        yield from ((step, *read) for read in _readings(rest, value[step]))
        is_branch = False
    if is_branch:
        yield from _readings(rest, value)


def _spell(path: Path) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")


def one_line(text: str, length: int) -> str:
    line = "".join(char if char.isprintable() else "?" for char in text[: length + 1])
    return line if len(line) <= length else line[: length - 3] + "..."
