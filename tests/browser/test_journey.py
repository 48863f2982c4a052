"""One journey through the page's features, on every screen and in both themes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import Open
from tests.browser.scripted import Server
from tests.browser.steps import (
    CHAT,
    SCREENS,
    USAGE,
    answer_text,
    answer_with,
    answers,
    assert_no_sideways_scroll,
    attach,
    contrast,
    edit,
    event,
    export_all,
    go,
    import_files,
    links,
    stop_button,
    stored,
    wait_for_end,
)

pytestmark = pytest.mark.slow

MODELS = [
    {"id": name, "max_model_len": 4096, "has_chat_template": True} for name in ("tiny", "other")
]
SCHEMA = {"type": "object"}


@dataclass(frozen=True)
class Screen:
    page: Page
    is_phone: bool

    def press(self, target: Locator) -> None:
        (target.tap if self.is_phone else target.click)()

    def open_list(self) -> None:
        """On a phone, the list of conversations is behind a button."""
        toggle = self.page.get_by_role("button", name="Conversations", exact=True)
        if self.is_phone and toggle.get_attribute("aria-expanded") == "false":
            toggle.tap()

    def begin(self, text: str) -> None:
        """Send `text` in a new conversation."""
        self.open_list()
        self.press(self.page.get_by_role("button", name="New conversation"))
        self.page.get_by_label("Message", exact=True).fill(text)
        self.press(self.page.get_by_role("button", name="Send"))

    def check_looks(self, *selectors: str) -> None:
        """All fits, and the text of these elements is readable."""
        assert_no_sideways_scroll(self.page)
        ratios = {selector: contrast(self.page, selector) for selector in selectors}
        assert {selector: ratio for selector, ratio in ratios.items() if ratio < 4.5} == {}


def stop_and_continue(screen: Screen, server: Server) -> None:
    page = screen.page
    screen.begin("slow please")
    expect(answers(page)).to_contain_text("slow slow")
    screen.press(stop_button(page))
    expect(answers(page)).to_contain_text("Stopped.")
    server.wait_for_cancel()
    seen = len(answer_text(answers(page)))
    screen.press(page.get_by_role("button", name="Continue"))
    page.wait_for_function(
        "(n) => document.querySelector('.assistant > .markdown').innerText.length > n", arg=seen
    )
    assert server.requests[-1]["continue_final_message"] is True
    screen.press(stop_button(page))
    expect(answers(page)).to_contain_text("Stopped.")
    server.wait_for_cancel()
    screen.check_looks(".stats", ".foot button")


def edit_and_regenerate(screen: Screen) -> None:
    page = screen.page
    screen.begin("hello")
    wait_for_end(answers(page))
    edit(answers(page), "My **own** words.", kind="answer")
    expect(answers(page)).to_contain_text("Edited.")
    screen.press(page.get_by_role("button", name="Regenerate"))
    versions = answers(page).get_by_role("group", name="Versions")
    expect(versions).to_contain_text("3 / 3")
    wait_for_end(answers(page))
    assert answer_text(answers(page)) == "You said: hello"
    go(answers(page), "Previous")
    expect(answers(page)).to_contain_text("My own words.")
    screen.check_looks(".version", ".assistant strong")


def attach_a_file(screen: Screen, server: Server, folder: Path) -> None:
    page = screen.page
    (folder / "notes.txt").write_text("noted")
    screen.open_list()
    screen.press(page.get_by_role("button", name="New conversation"))
    attach(page, folder / "notes.txt")
    expect(page.locator(".chip")).to_contain_text("notes.txt")
    screen.check_looks(".chip")
    page.get_by_label("Message", exact=True).fill("what is it?")
    screen.press(page.get_by_role("button", name="Send"))
    wait_for_end(answers(page))
    content = server.requests[-1]["messages"][0]["content"]
    assert content == "File: notes.txt\n```\nnoted\n```\n\nwhat is it?"
    screen.press(page.locator(".file-note summary"))
    expect(page.locator(".file-note pre")).to_have_text("noted\n")
    screen.check_looks(".file-note summary", ".file-note pre")


def search(screen: Screen) -> None:
    page = screen.page
    screen.open_list()
    field = page.get_by_role("searchbox", name="Search conversations")
    field.fill("own words")
    expect(links(page).locator(".entry-title")).to_have_text(["hello"])
    screen.check_looks(".excerpt", ".conversations a", "#search-found")
    screen.press(links(page))
    expect(answers(page)).to_contain_text("My own words.")
    expect(links(page)).to_have_count(0 if screen.is_phone else 1)
    screen.open_list()
    field.fill("")
    expect(links(page)).to_have_text(["what is it?", "hello", "slow please"])


def export_and_import(screen: Screen) -> None:
    page = screen.page
    screen.open_list()
    exported = export_all(page)
    before = sorted(stored(page), key=lambda record: record["id"])
    screen.press(page.get_by_role("button", name="Delete hello"))
    screen.check_looks("#confirm-delete h2", "#confirm-delete .danger")
    screen.press(page.get_by_role("dialog").get_by_role("button", name="Delete"))
    expect(links(page).filter(has_text="hello")).to_have_count(0)
    screen.open_list()
    import_files(page, exported)
    expect(page.locator("#notice")).to_contain_text("1 conversation imported.")
    assert sorted(stored(page), key=lambda record: record["id"]) == before
    screen.check_looks("#notice")


def choose_model_and_settings(screen: Screen) -> None:
    page = screen.page
    page.goto("/")
    screen.press(page.get_by_role("button", name="Settings", exact=True))
    page.get_by_label("Model", exact=True).select_option("other")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Stop strings").fill("END")
    page.get_by_label("JSON schema").fill(json.dumps(SCHEMA))
    screen.check_looks(".field label", ".field-hint", "#model", "#schema", "#sampling h3")
    screen.press(page.get_by_role("button", name="Close settings"))
    answer_with(page, [event({"content": "{}"}), event({}, "stop"), USAGE])
    with page.expect_request(CHAT) as request:
        screen.begin("to the other")
    wait_for_end(answers(page))
    body = request.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    wanted = {"model": "other", "temperature": 0.25, "stop": ["END"]}
    assert {**wanted, "structured_outputs": {"json": SCHEMA}}.items() <= body.items()
    screen.check_looks(".speaker", ".system-note summary")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_journey(open_page: Open, server: Server, tmp_path: Path, screen: str, scheme: str) -> None:
    """Each feature works, nothing scrolls sideways, and text has a contrast of 4.5 to 1."""
    page = open_page(color_scheme=scheme, **SCREENS[screen])
    page.context.route("**/v1/models", lambda route: route.fulfill(json={"data": MODELS}))
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == scheme
    shown = Screen(page, is_phone=screen == "phone")
    stop_and_continue(shown, server)
    edit_and_regenerate(shown)
    attach_a_file(shown, server, tmp_path)
    search(shown)
    export_and_import(shown)
    choose_model_and_settings(shown)
