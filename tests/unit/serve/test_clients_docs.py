"""docs/clients.md names tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ROWS = re.findall(
    r"^\|[^|]*\|[^|]+\| `([\w/]+\.py)::(\w+)` \|$",
    (ROOT / "docs/clients.md").read_text(),
    re.MULTILINE,
)


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_row_names_a_test() -> None:
    page = (ROOT / "docs/clients.md").read_text()
    assert len(ROWS) == page.count("::") > 20


@pytest.mark.parametrize(("path", "name"), ROWS)
def test_named_tests_exist(path: str, name: str) -> None:
    assert name in functions_of(path)
