"""Login with an API key: form, cookie, logout."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import REFUSED, Errors, Open
from tests.browser.scripted import Server, serve
from tests.browser.steps import (
    SCREENS,
    answers,
    ask,
    assert_no_sideways_scroll,
    contrast,
    send,
)

KEY = "a-key-of-this-test-0123456789"


@pytest.fixture(scope="module")
def keyed_server() -> Iterator[Server]:
    with serve(keys=(KEY,)) as running:
        yield running


@pytest.fixture
def form(open_page: Open, keyed_server: Server, errors: Errors) -> Page:
    """The login form, which comes with status 401."""
    errors.allow(REFUSED + "401")
    return open_page(at=keyed_server)


def log_in(page: Page, key: str = KEY) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Log in").click()
    if key == KEY:
        page.get_by_text("tokens of context").wait_for()


def test_login(form: Page) -> None:
    """With the key the page works; the cookie holds no key and no script can read it."""
    expect(form.get_by_label("API key")).to_be_focused()
    log_in(form)
    ask(form, "hello")
    cookies = {cookie["name"]: cookie for cookie in form.context.cookies()}
    cookie = cookies["lowlat_key"]
    assert cookie.get("httpOnly") and cookie.get("sameSite") == "Strict"
    assert KEY not in str(cookies)
    assert "lowlat_key" not in form.evaluate("document.cookie")
    form.reload()
    expect(answers(form)).to_contain_text("You said: hello")


def test_wrong_key(form: Page) -> None:
    log_in(form, KEY[:-1] + "x")
    expect(form.get_by_role("alert")).to_have_text(
        "The API key is invalid. Check it and log in again."
    )
    expect(form.get_by_label("API key")).to_have_value("")
    assert form.context.cookies() == []


def test_form_keeps_the_policy(form: Page) -> None:
    """Its style sheet applies although inline styles are forbidden: the policy names it by hash."""
    assert (
        form.locator("main").evaluate("(element) => getComputedStyle(element).borderRadius")
        == "16px"
    )
    assert form.locator("script").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_form_on_every_screen(
    open_page: Open, keyed_server: Server, errors: Errors, screen: str, scheme: str
) -> None:
    """It follows the system's theme, fits, is readable, and its controls suit a finger."""
    errors.allow(REFUSED + "401")
    page = open_page(at=keyed_server, color_scheme=scheme, **SCREENS[screen])
    log_in(page, KEY[:-1] + "x")
    expect(page.get_by_role("alert")).to_contain_text("invalid")
    texts = ("h1", "main > p", ".message", "label", "input", "button")
    ratios = {selector: contrast(page, selector) for selector in texts}
    assert {selector: ratio for selector, ratio in ratios.items() if ratio < 4.5} == {}
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", back))) < 64) == (scheme == "dark")
    assert_no_sideways_scroll(page)
    for control in (page.get_by_label("API key"), page.get_by_role("button", name="Log in")):
        expect(control).to_be_in_viewport()
        assert control.evaluate("(element) => element.offsetHeight") >= 40
    log_in(page)


def test_logout(form: Page) -> None:
    """Leaving takes the cookie away; the conversations stay in the browser."""
    log_in(form)
    ask(form, "hello")
    form.get_by_role("button", name="Log out").click()
    expect(form.get_by_label("API key")).to_be_visible()
    assert form.context.cookies() == []
    log_in(form)
    expect(form.get_by_role("navigation").get_by_role("link")).to_have_text(["hello"])


def test_key_withdrawn(form: Page) -> None:
    """A page that is open when its key is removed shows the server's message and a link to the
    form."""
    log_in(form)
    form.context.clear_cookies()
    send(form, "hello")
    expect(answers(form).get_by_role("alert")).to_contain_text("a valid API key is required")
    answers(form).get_by_role("link", name="Log in").click()
    expect(form.get_by_label("API key")).to_be_visible()
    log_in(form)
    expect(form.get_by_role("navigation").get_by_role("link")).to_have_text(["hello"])


def test_no_log_out_without_keys(open_page: Open) -> None:
    page = open_page()
    page.get_by_text("tokens of context").wait_for()
    expect(page.get_by_role("button", name="Log out")).to_have_count(0)
