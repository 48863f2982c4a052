"""Request bodies: size limit, timeout, strict JSON."""

import asyncio
import json
from collections.abc import Sequence

import pytest
from starlette.datastructures import Headers
from starlette.types import Message

from lowlat.serve.http.body import Disconnected, check_json_headers, parse_object, read_body
from lowlat.serve.http.incoming import IncomingBodies
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.limits import MAX_JSON_DEPTH

NO_HEADERS = Headers({})


def part(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


def read(messages: Sequence[Message], headers: Headers = NO_HEADERS) -> bytes:
    """What `read_body` makes of `messages`, at most 10 bytes within 0.05 seconds."""
    coming = list(messages)

    async def receive() -> Message:
        if not coming:
            await asyncio.Event().wait()
        return coming.pop(0)

    bodies = IncomingBodies(max_slow=4)
    return asyncio.run(
        read_body(receive, headers, max_bytes=10, seconds=0.05, bodies=bodies, owners=())
    )


def test_parts_are_joined() -> None:
    assert read([part(b"12345"), part(b"67890"), part(b"", more=False)]) == b"1234567890"


def test_more_than_the_cap_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        read([part(b"12345"), part(b"678901")])
    assert caught.value.status == 413


def test_a_declared_length_above_the_cap_is_refused_unread() -> None:
    with pytest.raises(RequestError) as caught:
        read([], Headers({"content-length": "11"}))
    assert caught.value.status == 413


@pytest.mark.parametrize("length", ["9" * 5000, "-5", "x", "٣"])
def test_strange_lengths_do_no_harm(length: str) -> None:
    """Regression: an endless conversion of a number with thousands of digits."""
    headers = Headers(raw=[(b"content-length", length.encode()[:4000])])
    try:
        assert read([part(b"1", more=False)], headers) == b"1"
    except RequestError as error:
        assert error.status == 413


def test_a_slow_sender_is_given_up() -> None:
    with pytest.raises(RequestError) as caught:
        read([part(b"1")])
    assert caught.value.status == 408


def test_a_client_that_leaves_is_noticed() -> None:
    with pytest.raises(Disconnected):
        read([part(b"1"), {"type": "http.disconnect"}])


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/json"},
        {"content-type": "Application/JSON; charset=UTF-8"},
        {"content-type": 'application/json; charset="utf-8"'},
        {"content-type": "application/json", "content-encoding": "identity"},
    ],
)
def test_plain_json_is_taken(headers: dict[str, str]) -> None:
    check_json_headers(Headers(headers))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_other_types_are_refused(headers: dict[str, str]) -> None:
    """Regression: bodies that a foreign page may send without asking (text/plain, forms)."""
    with pytest.raises(RequestError) as caught:
        check_json_headers(Headers(headers))
    assert caught.value.status == 415


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{}{}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"a": 1, "a": 1}', "duplicate key"),
        (b'{"b": [{"a": 1, "a": 2}]}', "duplicate key"),
        (b'{"\\ud800": 1, "\\ud800": 2}', "duplicate key"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "JSON"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": ["x\\uDFFF"]}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 01}', "not valid JSON"),
        (b'{"a": "\x01"}', "not valid JSON"),
    ],
)
def test_json_is_not_guessed(body: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        parse_object(body)
    assert caught.value.status == 400
    assert "\n" not in caught.value.message


def nested(depth: int) -> bytes:
    """An object in which values lie `depth` levels deep, itself counted."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_depth_is_capped() -> None:
    parse_object(nested(MAX_JSON_DEPTH))
    for depth in (MAX_JSON_DEPTH + 1, 900, 30_000):
        with pytest.raises(RequestError, match="nested deeper"):
            parse_object(nested(depth))
        objects = b'{"a":' * depth + b"1" + b"}" * depth
        with pytest.raises(RequestError, match="nested deeper"):
            parse_object(objects)


def test_values_stay_as_they_are() -> None:
    value = {"a": [1, 2.5, True, None, "é\U0001f600"], "b": {"c": -(1 << 63)}}
    assert parse_object(json.dumps(value).encode()) == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode()) == value


def test_numbers_without_a_fraction_are_integers() -> None:
    """JSON schema defines them so, and the published document is one."""
    value = parse_object(b'{"a": [78.0, 1e2, -0.0, 0.5, 1e300]}')["a"]
    assert value == [78, 100, 0, 0.5, 1e300]
    assert [type(number) for number in value] == [int, int, int, float, float]
