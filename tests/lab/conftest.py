"""Runs `lowlat-lab` in this process."""

from collections.abc import Callable

import pytest
from lowlat_lab.cli.main import app
from typer.testing import CliRunner, Result


@pytest.fixture
def lowlat_lab() -> Callable[..., Result]:
    """Run `lowlat-lab ARGUMENTS`."""
    return lambda *arguments: CliRunner().invoke(app, list(arguments))
