"""Counting of JSON values before parsing."""

import json
import random
from typing import Any

import pytest

from lowlat.serve.http import json_values
from lowlat.serve.http.body import parse_object
from lowlat.serve.http.json_values import count_values
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.limits import MAX_JSON_KEYS, MAX_JSON_VALUES

TEXTS = ["", "a", '"', "\\", '\\"', "\\\\", 'x\\\\\\"', "[1,2]", "{}", ",:,", "é😀", "\n\t", "-1"]


def counted(value: Any, *, elements: bool) -> int:
    """The count by its definition, over the parsed value."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(counted(inner, elements=elements) for inner in value.values())
    if isinstance(value, list):
        return 1 + sum(
            counted(inner, elements=elements)
            for inner in value
            if elements or isinstance(inner, bool) or not isinstance(inner, int | float)
        )
    return 1


def drawn(rng: random.Random, depth: int = 4) -> Any:
    kind = rng.randrange(6 if depth else 4)
    if kind == 0:
        return rng.choice([None, True, False, 0, -7, 1.5e-3, 123456789])
    if kind < 4:
        return "".join(rng.choice(TEXTS) for _ in range(rng.randrange(4)))
    count = rng.randrange(5)
    if kind == 4:
        return [drawn(rng, depth - 1) for _ in range(count)]
    return {rng.choice(TEXTS) + str(i): drawn(rng, depth - 1) for i in range(count)}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
def test_counts_are_those_of_a_parser(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every place where a text can be cut: inside strings, runs of backslashes and numbers."""
    monkeypatch.setattr(json_values, "CHUNK_BYTES", chunk)
    rng = random.Random(chunk)
    for _ in range(60):
        value = drawn(rng)
        indent, ascii_only = rng.choice([None, 0, 3]), rng.random() < 0.5
        text = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
        assert count_values(text) == counted(value, elements=True), text
        assert count_values(text, counts_elements=False) == counted(value, elements=False), text


def test_what_is_no_json_is_counted_too() -> None:
    for text in (b"", b'"', b"\\", b'{"a', b"]]]", b'"\\', b"\x00\xff", b"[[[["):
        assert count_values(text) >= 0
    assert count_values(b"[" * 1000) == 1000
    assert count_values(b"[1" + b", 2" * 1000, counts_elements=False) == 1
    # Outside arrays numbers count, and literals count everywhere.
    assert count_values(b'{"a": 1, "b": [null, 2]}', counts_elements=False) == 6


@pytest.mark.parametrize(
    "inner",
    [
        b"{}," * MAX_JSON_VALUES + b"{}",
        b'"",' * MAX_JSON_VALUES + b'""',
        b"null," * MAX_JSON_VALUES + b"null",
        b'{"a":[' + b"1," * MAX_JSON_VALUES + b"1]}",
        b"[" * 2 * MAX_JSON_VALUES,
    ],
    ids=["objects", "strings", "nulls", "numbers inside", "brackets"],
)
def test_too_many_values_are_refused(inner: bytes) -> None:
    with pytest.raises(RequestError, match="more than 100000 JSON values"):
        parse_object(b'{"a": [' + inner + b"]}")


def test_token_ids_and_long_texts_are_exempt() -> None:
    ids = b"1," * (2 * MAX_JSON_VALUES) + b"1"
    assert len(parse_object(b'{"prompt": [' + ids + b"]}")["prompt"]) == 2 * MAX_JSON_VALUES + 1
    assert parse_object(b'{"prompt": [[' + ids + b"],[2]]}")["prompt"][1] == [2]
    text = "[],{}" * MAX_JSON_VALUES
    assert parse_object(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_objects_of_too_many_keys_are_refused() -> None:
    value = {f"k{index}": 1 for index in range(MAX_JSON_KEYS)}
    assert parse_object(json.dumps(value).encode()) == value
    with pytest.raises(RequestError, match="more than 2048 keys"):
        parse_object(json.dumps({"a": {**value, "more": 1}}).encode())
