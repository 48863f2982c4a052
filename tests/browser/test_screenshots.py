"""The screenshots of docs/ can be made again."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.screenshots import record

DOCS = Path(__file__).parents[2] / "docs"


def size(picture: Path) -> bytes:
    """Width and height, as a PNG file has them."""
    return picture.read_bytes()[16:24]


@pytest.mark.slow
def test_the_script_makes_all(browser: Browser, tmp_path: Path) -> None:
    """Four different pictures, with the names and sizes of those in docs/."""
    record(browser, tmp_path)
    made = {path.name: size(path) for path in tmp_path.iterdir()}
    assert made == {path.name: size(path) for path in DOCS.glob("chat-page*.png")}
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == len(made) == 4
