"""docs/clients.md names tests that exist, and all tests of clients."""

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
NOT_OF_A_CLIENT = {
    "abuse/test_retries.py",
    "clients/test_npm.py",
    "server/test_context_overflow.py",
    "server/test_embeddings.py",
}
"""Files that test other things as well."""


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


def test_every_test_of_a_client_has_a_row() -> None:
    """Those of `clients/` and of the files that the table names."""
    files = {f"clients/{file.name}" for file in (ROOT / "tests/clients").glob("test_*.py")}
    files |= {path for path, _ in ROWS}
    tests = {
        (path, name)
        for path in files - NOT_OF_A_CLIENT
        for name in functions_of(path)
        if name.startswith("test_")
    }
    assert len(tests) > 50 and tests <= set(ROWS), tests - set(ROWS)
