"""Python literals of MiniCPM3's tool calls as JSON."""

import pytest

from lowlat.serve.tool_parsers.python_calls import arguments_as_json
from lowlat.serve.tool_parsers.reader import Malformed


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("f()", "{}"),
        ("f(a=True, b=None, c=-1.5)", '{"a": true, "b": null, "c": -1.5}'),
        ("f(a=true, b=null)", '{"a": true, "b": null}'),
        ("f(a='x)\\'', b={'k': [1, (2,)]})", '{"a": "x)\'", "b": {"k": [1, [2]]}}'),
        ("f(a='Zürich \\d')", '{"a": "Zürich \\\\d"}'),
        (r"f(a='\ud800')", r'{"a": "\ud800"}'),
    ],
)
def test_literals(code: str, expected: str) -> None:
    assert arguments_as_json(code) == expected


@pytest.mark.parametrize(
    "code",
    [
        "f(1)",
        "f(**a)",
        "f(a=g())",
        "f(a=1e999)",
        "f(a=b'x')",
        "f(a={1: 2})",
        "f(a=" + "[" * 5000,
        "f(a='\0')",
        "f",
        "f(a=1); g()",
        f"f(a='{'x' * 70_000}')",
    ],
)
def test_other_code_is_malformed(code: str) -> None:
    with pytest.raises(Malformed):
        arguments_as_json(code)
