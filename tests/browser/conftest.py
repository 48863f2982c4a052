"""Fixtures: Chromium and a real server with scripted outputs.

A page whose console shows an error, or which asks for anything outside its server, fails its test.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Page,
    Request,
    expect,
    sync_playwright,
)

from tests.browser.scripted import ScriptedEngine, Server, serve, tiny_chat_model

VARIABLE = "LOWLAT_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "Chromium is not here: install it (Debian, Ubuntu: apt-get install chromium), name the program "
    f"in {VARIABLE}, or leave these tests out with -m 'not browser'"
)
ARGUMENTS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
TIMEOUT = 60_000.0  # milliseconds: machines that run tests may have much else to do
# Chromium's own report of an answer with status 4xx or 5xx; tests that cause one allow it.
REFUSED = "Failed to load resource: the server responded with a status of "
BROKEN = "Failed to load resource: net::"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


def chromium_program() -> str | None:
    return os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)


# Not for the session: while it is there an event loop runs, and tests elsewhere run their own.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    program = chromium_program()
    if program is None:
        pytest.fail(MISSING, pytrace=False)
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        # Tests may run as root in a container, where Chromium's sandbox does not work.
        chromium = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the tests of a file; without keys."""
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def plain_server() -> Iterator[Server]:
    """A server whose model has no chat template."""
    with serve(ScriptedEngine(tiny_chat_model(has_template=False))) as running:
        yield running


class Errors:
    """What went wrong in the pages of one test; `allow` names the beginnings of what may."""

    def __init__(self) -> None:
        self.allowed: list[str] = []
        self.seen: list[str] = []

    def allow(self, *beginnings: str) -> None:
        self.allowed.extend(beginnings)

    def on_console(self, message: ConsoleMessage) -> None:
        # Violations of the security policy are console errors, too.
        if message.type in ("error", "warning"):
            self.seen.append(message.text)

    def check(self) -> None:
        bad = [text for text in self.seen if not text.startswith(tuple(self.allowed))]
        assert not bad, f"errors in the page: {bad}"


@pytest.fixture
def errors() -> Iterator[Errors]:
    found = Errors()
    yield found
    found.check()


Open = Callable[..., Page]


class Profile:
    """A browser profile for pages of one server. Plain ones serve one test after another, as
    Chromium takes a second for the first page of a new one.
    """

    def __init__(self, browser: Browser, url: str, **options: object) -> None:
        options = {"viewport": {"width": 1280, "height": 800}, **options}
        self.context = browser.new_context(base_url=url, **options)  # pyright: ignore[reportArgumentType]
        self.context.set_default_timeout(TIMEOUT)
        self._url = url
        self._blank = self.context.new_page()

    def clear(self) -> None:
        """Nothing of a test is left: pages, what they stored, routes, permissions."""
        for page in self.context.pages:
            if page != self._blank:
                page.close()
        session = self.context.new_cdp_session(self._blank)
        session.send("Storage.clearDataForOrigin", {"origin": self._url, "storageTypes": "all"})
        session.send("Network.clearBrowserCache")
        session.detach()
        self.context.clear_cookies()
        self.context.clear_permissions()
        self.context.unroute_all()


@pytest.fixture(scope="module")
def profiles() -> Iterator[dict[str, Profile]]:
    """Plain profiles by the server's URL."""
    found: dict[str, Profile] = {}
    yield found
    for profile in found.values():
        profile.context.close()


@pytest.fixture
def open_page(
    browser: Browser, server: Server, errors: Errors, profiles: dict[str, Profile]
) -> Iterator[Open]:
    """Opens the page in a browser profile of its own; keywords are new_context's."""
    with contextlib.ExitStack() as stack:
        used: list[Profile] = []

        def open_one(path: str = "/", *, at: Server = server, **options: object) -> Page:
            profile = None if options else profiles.get(at.url)
            if profile is None or profile in used:
                profile = Profile(browser, at.url, **options)
            if options or profiles.setdefault(at.url, profile) is not profile:
                stack.callback(profile.context.close)
            else:
                stack.callback(profile.clear)
            used.append(profile)

            def look(request: Request) -> None:
                if not request.url.startswith((at.url, "blob:")):
                    errors.seen.append(f"asked for {request.url}")

            profile.context.on("request", look)
            stack.callback(profile.context.remove_listener, "request", look)
            page = profile.context.new_page()
            page.on("console", errors.on_console)
            page.on("pageerror", lambda error: errors.seen.append(str(error)))
            page.goto(path)
            return page

        yield open_one


@pytest.fixture
def page(open_page: Open) -> Page:
    """The page on a wide screen, ready: the model's name is there."""
    page = open_page()
    page.get_by_text("tokens of context").wait_for()
    return page
