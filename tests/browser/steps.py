"""User actions and observations for the tests of the page."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, Route

CHAT = "**/v1/chat/completions"
SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True},
}
"""Options of a browser context."""


def script(name: str) -> str:
    """A function for Page.evaluate, from the folder js."""
    return Path(__file__).with_name("js").joinpath(name).read_text()


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def ask(page: Page, text: str) -> Locator:
    """Send `text`, wait until the response is complete and saved, and return it.

    The conversation has to be on the page: after a reload, wait for what it should show.
    """
    num_answers = answers(page).count()
    send(page, text)
    answer = answers(page).nth(num_answers)
    wait_for_end(answer)
    return answer


def wait_for_end(answer: Locator) -> None:
    """Wait until `answer`, of the open conversation, is complete and saved."""
    answer.locator(".stats").filter(has_text="token").wait_for()
    answer.page.wait_for_function(
        f"""async () => {{
          const stored = await ({script("stored.js")})();
          const open = stored.find(({{ id }}) => id === location.hash.slice(1));
          return open !== undefined && open.messages.at(-1).status === "done";
        }}"""
    )


def record_texts(page: Page, selector: str) -> Callable[[], list[str]]:
    """Begin to record the texts of elements that match `selector`; the result returns them.

    For what stands on the page for so short a time that a slow machine may look too late.
    """
    page.evaluate(
        """(selector) => {
          const texts = ((window.recorded ??= {})[selector] = []);
          const look = () => {
            for (const { textContent } of document.querySelectorAll(selector)) {
              if (textContent && texts.at(-1) !== textContent) texts.push(textContent);
            }
          };
          const what = { childList: true, subtree: true, characterData: true };
          new MutationObserver(look).observe(document.body, what);
        }""",
        selector,
    )
    return lambda: page.evaluate("(selector) => window.recorded[selector]", selector)


def answers(page: Page) -> Locator:
    return page.locator("article.assistant")


def answer_text(answer: Locator) -> str:
    return answer.locator(":scope > .markdown").inner_text()


def users(page: Page) -> list[str]:
    return page.locator("article.user .bubble").all_inner_texts()


def stop_button(page: Page) -> Locator:
    return page.get_by_role("button", name="Stop")


def links(page: Page) -> Locator:
    """The conversations in the list."""
    return page.get_by_role("navigation").get_by_role("link")


def edit(message: Locator, text: str, *, kind: str = "message") -> None:
    message.get_by_role("button", name=f"Edit {kind}").click()
    message.get_by_role("textbox", name=f"Edit {kind}").fill(text)
    message.get_by_role("button", name=re.compile("^Save")).click()


def go(message: Locator, direction: str) -> None:
    message.get_by_role("button", name=f"{direction} version").click()


def attach(page: Page, *files: str | Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Attach text files").click()
    chooser.value.set_files([str(file) for file in files])


def import_files(page: Page, *files: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import").click()
    chooser.value.set_files([str(file) for file in files])


def export_all(page: Page) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    assert download.value.suggested_filename.startswith("lowlat-conversations-")
    return Path(download.value.path())


def stored(page: Page) -> list[dict[str, Any]]:
    """The conversations saved in the browser."""
    return page.evaluate(script("stored.js"))


def event(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 30,
        "completion_tokens": 12,
        "total_tokens": 42,
        "prompt_tokens_details": {"cached_tokens": 16},
    },
    "lowlat": {"prefill_seconds": 0.25, "decode_seconds": 2.0, "tokens_per_second": 5.5},
}


def answer_with(page: Page, events: Sequence[dict[str, Any]], *, is_complete: bool = True) -> None:
    """Answer the page's next requests with these chunks, in place of the server."""
    body = "".join(f"data: {json.dumps(item)}\n\n" for item in events)
    if is_complete:
        body += "data: [DONE]\n\n"

    def fulfil(route: Route) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route(CHAT, fulfil)


def refuse_with(page: Page, status: int, message: str, *, times: int, **headers: str) -> None:
    """Refuse the page's next `times` requests for an answer in the server's error shape."""
    error = {"error": {"message": message, "type": "x", "param": None, "code": None}}

    def fulfil(route: Route) -> None:
        route.fulfill(status=status, json=error, headers=headers)

    page.route(CHAT, fulfil, times=times)


def contrast(page: Page, selector: str) -> float:
    """WCAG's contrast between an element's text and the nearest background behind it."""
    return page.locator(selector).first.evaluate(script("contrast.js"))


def assert_no_sideways_scroll(page: Page) -> None:
    wide = page.evaluate(
        """() => [...document.querySelectorAll("html, body, #thread")]
          .filter((element) => element.scrollWidth > element.clientWidth)
          .map((element) => element.localName)"""
    )
    assert wide == []
    sticking_out = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((element) => {
          const { left, right, width } = element.getBoundingClientRect();
          // What lies in a box with its own scroll bar may be wider.
          const isApart = element.closest("pre, .table-wrap, .visually-hidden, .math");
          return width > 0 && (left < -1 || right > innerWidth + 1) && !isApart;
        }).map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert sticking_out == []
