"""Parameters of tests, some of them only in the whole suite."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_except(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """`values` as parameters of a test; all but those in `quick` are marked slow."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]
