"""The instruction-set level that a test runs at."""

from collections.abc import Iterator

import pytest

from lowlat.ops import native


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    used = native.level()
    native.module().set_level(request.param)
    yield request.param
    native.module().set_level(used)
