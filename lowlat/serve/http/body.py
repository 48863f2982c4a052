"""Request bodies: size limit, read timeout, strict JSON parsing.

Validation of the parsed values is in `serve.protocol`.
"""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.types import Receive

from lowlat.serve.protocol import limits
from lowlat.serve.protocol.errors import RequestError

_LONE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHOWN = 60
MAX_EXACT = 2.0**53
"""Floats represent every integer below it exactly."""


class Disconnected(Exception):
    """The client has disconnected."""


def check_json_headers(headers: Headers) -> None:
    """Raise RequestError 415 unless the Content-Type is JSON, without an encoding.

    A browser must send a CORS preflight before it sends this type to another origin.
    """
    kind, _, rest = headers.get("content-type", "").partition(";")
    charset = rest.strip().lower().replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise RequestError("Content-Type must be application/json", status=415)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("Content-Encoding must be identity (none)", status=415)


async def read_body(
    receive: Receive, headers: Headers, *, max_bytes: int, seconds: int | float
) -> bytes:
    """Read the whole body.

    Raises RequestError 413 above `max_bytes` (before reading if Content-Length exceeds it) and 408
    after `seconds`, Disconnected if the client disconnects.
    """
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(seconds):
            return await _read(receive, max_bytes)
    except TimeoutError as error:
        raise RequestError(
            f"the request's body did not arrive within {seconds:g} seconds", status=408
        ) from error


async def _read(receive: Receive, max_bytes: int) -> bytes:
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        more = message.get("more_body", False)
    return bytes(body)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the request's body is larger than {max_bytes} bytes", status=413)


def parse_object(
    text: bytes, *, what: str = "the body", param: str | None = None, keeps_floats: bool = False
) -> dict[str, Any]:
    """Parse a JSON object: UTF-8, no duplicate keys, finite numbers, bounded depth.

    A number without a fraction becomes an integer, unless `keeps_floats`. Raises RequestError for
    anything else; its message starts with `what`, its field is `param`.
    """
    try:
        return _parse(text, _finite if keeps_floats else _number)
    except _InvalidJson as error:
        raise RequestError(f"{what} {error}", param=param) from error.__cause__


class _InvalidJson(Exception):
    """Why a text is rejected."""


def _parse(text: bytes, number: Callable[[str], int | float]) -> dict[str, Any]:
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=number,
            parse_int=_bounded,
        )
    except RecursionError as error:
        raise _too_deep() from error
    except UnicodeDecodeError as error:
        raise _InvalidJson(f"is not valid UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _InvalidJson(f"is not valid JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(value, dict):
        raise _InvalidJson("must be a JSON object")
    _check_depth(value)
    if _LONE_ESCAPE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _InvalidJson("contains an unpaired surrogate in a string") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _InvalidJson(f"has the duplicate key {key[:_SHOWN]!r}; keep one")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise _InvalidJson(f"contains {text}, which is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _InvalidJson(f"contains the number {text[:_SHOWN]}, which is too large")
    return number


def _number(text: str) -> int | float:
    number = _finite(text)
    # As in JSON Schema: a number without a fraction is an integer, however it is written.
    return int(number) if number.is_integer() and abs(number) < MAX_EXACT else number


def _bounded(text: str) -> int:
    if len(text) > 32:
        raise _InvalidJson(f"contains the number {text[:_SHOWN]}, which is too large")
    return int(text)


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(limits.MAX_JSON_DEPTH):
        children = [item.values() if isinstance(item, dict) else item for item in level]
        level = [child for each in children for child in each if isinstance(child, dict | list)]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> _InvalidJson:
    return _InvalidJson(f"is nested deeper than {limits.MAX_JSON_DEPTH} levels")
