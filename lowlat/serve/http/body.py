"""Request bodies: size limit, read timeout, strict JSON parsing.

Validation of the parsed values is in `serve.protocol`.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.types import Receive

from lowlat.serve.http.incoming import IncomingBodies, IncomingBody
from lowlat.serve.http.json_values import MIN_BYTES_PER_VALUE, count_values
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.errors import RequestError

_LONE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHOWN = 60
TOKEN_ID_DEPTH = 2
"""Arrays of token ids are fields of a body, or elements of such a field."""
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
    receive: Receive,
    headers: Headers,
    *,
    max_bytes: int,
    seconds: int | float,
    bodies: IncomingBodies,
    owners: Sequence[str],
) -> bytes:
    """Read the whole body, as one of `bodies`; `owners`: its API key and client address.

    Raises RequestError 413 above `max_bytes` (before reading if Content-Length exceeds it) and 408
    after `seconds` or if it is dropped as too slow, Disconnected if the client disconnects.
    """
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = None
    try:
        async with asyncio.timeout(seconds) as waiting:
            with bodies.track(owners, waiting) as body:
                return await _read(receive, max_bytes, bodies, body)
    except TimeoutError as error:
        message = f"the request's body did not arrive within {seconds:g} seconds"
        if body is not None and body.is_dropped:
            message = "the request's body arrived too slowly while many others did; send it again"
        raise RequestError(message, status=408) from error


async def _read(
    receive: Receive, max_bytes: int, bodies: IncomingBodies, incoming: IncomingBody
) -> bytes:
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        body += part
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        more = message.get("more_body", False)
        if more:
            bodies.add_bytes(incoming, len(part))
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
    _check_count(text)
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
    strings = _check_depth(value)
    if _LONE_ESCAPE.search(text):
        try:
            for string in strings:
                string.encode()
        except UnicodeEncodeError as error:
            raise _InvalidJson("contains an unpaired surrogate in a string") from error
    return value


def _check_count(text: bytes) -> None:
    """Bound the objects that a parser would create, before it does."""
    most = limits.MAX_JSON_VALUES
    if len(text) > most * MIN_BYTES_PER_VALUE and count_values(text, counts_elements=False) > most:
        raise _too_many()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > limits.MAX_JSON_KEYS:
        raise _InvalidJson(f"has an object with more than {limits.MAX_JSON_KEYS} keys; send fewer")
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


def _check_depth(value: dict[str, Any]) -> list[str]:
    """Check the depth of `value` and the length of its inner arrays; return its strings and keys.

    Only arrays of the two outermost levels hold token ids: longer ones further inside would make
    json.dumps hold the interpreter's lock. Loops of Python, however long, let other threads run.
    """
    strings: list[str] = []
    level: list[Any] = [value]
    num_elements = 0
    for depth in range(limits.MAX_JSON_DEPTH):
        if depth > TOKEN_ID_DEPTH:
            num_elements += sum(len(item) for item in level)
            if num_elements > limits.MAX_JSON_VALUES:
                raise _too_many()
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                strings += item
                item = item.values()
            for child in item:
                if isinstance(child, str):
                    strings.append(child)
                elif isinstance(child, dict | list):
                    inner.append(child)
        level = inner
        if not level:
            return strings
    raise _too_deep()


def _too_many() -> _InvalidJson:
    return _InvalidJson(
        f"has more than {limits.MAX_JSON_VALUES} JSON values (keys included, token ids excluded); "
        "send a smaller request"
    )


def _too_deep() -> _InvalidJson:
    return _InvalidJson(f"is nested deeper than {limits.MAX_JSON_DEPTH} levels")
