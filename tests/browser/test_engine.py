"""The page with a real engine and a tiny model."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from lowlat.serve.async_engine import AsyncEngine
from tests.browser.conftest import REFUSED, Errors, Open
from tests.browser.scripted import Server, serve, tiny_chat_model
from tests.browser.steps import answer_text, answers, ask, send, stop_button


@pytest.fixture(scope="module")
def engine_server() -> Iterator[Server]:
    with serve(AsyncEngine(tiny_chat_model())) as running:
        yield running


@pytest.fixture
def page(open_page: Open, engine_server: Server) -> Page:
    page = open_page(at=engine_server)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Temperature").fill("0")
    return page


def test_answer(page: Page) -> None:
    """The model's own words arrive, and tokens and cache bytes are those of the engine."""
    answer = ask(page, "hello")
    assert answer_text(answer) == "abcdefghijklmnopqrstuvwxyz"
    # <s> <user> and <assistant>, five letters, </s>; the alphabet and </s>.
    expect(answer.locator(".stats")).to_contain_text("27 tokens")
    expect(answer.locator(".stats")).to_contain_text("prompt 9")
    expect(page.locator("#usage-text .tokens")).to_have_text("36 / 4,096 tokens")


def test_system_prompt_and_limit(page: Page) -> None:
    """What the settings say reaches the engine."""
    page.get_by_label("System prompt").fill("Spell.")
    page.get_by_label("Max tokens").fill("3")
    answer = ask(page, "hello")
    assert answer_text(answer) == "abc"
    expect(answer).to_contain_text("Stopped at the token limit.")


def test_too_long(page: Page, errors: Errors) -> None:
    """A prompt beyond the context is refused by name, in the answer's place."""
    errors.allow(REFUSED + "400")
    send(page, "hello " * 1000)
    expect(answers(page).get_by_role("alert")).to_contain_text("4096")
    expect(stop_button(page)).to_be_hidden()


def test_continue(page: Page) -> None:
    """An answer that was cut off continues with the model's own next tokens, in place."""
    page.get_by_label("Max tokens").fill("3")
    answer = ask(page, "hello")
    assert answer_text(answer) == "abc"
    for text in ("abcdef", "abcdefghi"):
        page.get_by_role("button", name="Continue").click()
        expect(answer.locator(":scope > .markdown")).to_have_text(text)
        expect(answer.locator(".stats")).to_contain_text(f"{len(text)} tokens")
    # <s> <user> and <assistant>, five letters, </s>, the answer.
    expect(page.locator("#usage-text .tokens")).to_have_text("18 / 4,096 tokens")
