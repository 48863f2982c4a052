"""The streaming JSON scanner, compared with Python's parser."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowlat.serve.tool_parsers.json_scanner import ObjectScanner, read_string, read_value
from lowlat.serve.tool_parsers.reader import IncrementalReader, Malformed, Steps

values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=3)


def read(steps: Steps[str], reader: IncrementalReader, text: str) -> str:
    """The result of `steps` when `text` arrives character by character."""
    try:
        next(steps)
        for char in text:
            reader.feed(char)
            next(steps)
        reader.end()
        next(steps)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("still waiting after the end")


@given(value=objects, ascii=st.booleans(), indent=st.sampled_from([None, 2]), rest=st.text())
def test_objects_end_where_they_end(
    value: dict[str, Any], ascii: bool, indent: int | None, rest: str
) -> None:
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    scanner = ObjectScanner()
    assert scanner.scan(text + rest) == (len(text), text)
    assert scanner.is_done


@given(text=st.text(alphabet='{}[]",:\\ue0127-+.Etrufalsn \n', max_size=12).map("{".__add__))
def test_only_json_is_followed_to_an_end(text: str) -> None:
    """Regression: a scanner that is laxer than the clients' parsers."""
    scanner = ObjectScanner()
    count, shown = scanner.scan(text)
    if scanner.is_done:
        assert isinstance(json.loads(shown), dict)
        assert json.loads(text[:count], strict=False) == json.loads(shown)
    else:
        with pytest.raises(json.JSONDecodeError):
            json.loads(text, strict=False)


@given(value=values, rest=st.sampled_from([",", "}", " ", "]"]))
def test_values_are_parsed_completely(value: Any, rest: str) -> None:
    reader = IncrementalReader()
    assert json.loads(read(read_value(reader), reader, json.dumps(value) + rest)) == value


@given(text=st.text(max_size=8), rest=st.text(max_size=3))
def test_strings_are_decoded(text: str, rest: str) -> None:
    reader = IncrementalReader()
    assert read(read_string(reader), reader, json.dumps(text) + rest) == text


@pytest.mark.parametrize("text", ["nul,", "01 ", "'a'", "-", '"a', "[1,]", '{"a" 1}', "NaN,", ""])
def test_what_is_no_value_is_refused(text: str) -> None:
    reader = IncrementalReader()
    with pytest.raises(Malformed):
        read(read_value(reader), reader, text)


def test_deep_nesting_is_refused() -> None:
    """Regression: a value that no parser of the answer could read."""
    scanner = ObjectScanner()
    count, _ = scanner.scan('{"a":' + "[" * 1000)
    assert count < 200
    assert not scanner.is_done
