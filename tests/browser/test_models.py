"""The page and a server of several models, which are loaded on demand."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from lowlat.serve.app import make_state
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from tests.browser.conftest import Open
from tests.browser.scripted import Server, serve_state
from tests.browser.steps import answer_text, ask
from tests.unit.serve.on_demand import Loader, stepping_model


@pytest.fixture
def several() -> Iterator[Server]:
    loaders = [Loader("one", lambda: stepping_model(1)), Loader("two", lambda: stepping_model(2))]
    state = make_state([loader.served for loader in loaders], ServeConfig())
    with serve_state(state) as (url, requests):
        yield Server(url, AsyncEngine(stepping_model(1)), requests)


def test_the_picker_chooses_what_answers(open_page: Open, several: Server) -> None:
    """All models are in the picker before one is loaded; the chosen one answers."""
    page = open_page(at=several)
    page.get_by_role("button", name="Settings", exact=True).click()
    picker = page.get_by_label("Model", exact=True)
    expect(picker.locator("option")).to_have_text(["one", "two"])
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("3")
    for name, text in (("two", "ace"), ("one", "abc")):
        picker.select_option(name)
        assert answer_text(ask(page, "hello")) == text
        assert several.requests[-1]["model"] == name
    page.reload()
    expect(page.locator(".welcome, #messages")).not_to_have_count(0)
    page.get_by_role("button", name="Settings", exact=True).click()
    expect(picker.locator("option")).to_have_text(["one", "two"])
    expect(page.locator("#model-facts")).to_contain_text("512 tokens")
