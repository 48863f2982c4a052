"""One tiny model with its texts, and what an uninterrupted healing makes of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import tiny


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of model and texts; `whole` in it was healed without interruption."""
    folder = tiny.make(tmp_path_factory.mktemp("heal"))
    with pytest.MonkeyPatch.context() as patch:
        tiny.scale_down(patch)
        tiny.call(folder, folder / "whole")
        yield folder
