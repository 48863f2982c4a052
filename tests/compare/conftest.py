"""Other programs run in forks of a process that has torch."""

from tests.unit.bench.conftest import forked_workers

__all__ = ["forked_workers"]  # the fixture
