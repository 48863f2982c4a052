"""Appearance: contrast, dark theme, narrow screens, large text, motion, scrolling."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Open
from tests.browser.steps import (
    SCREENS,
    answers,
    ask,
    assert_no_sideways_scroll,
    contrast,
    send,
    stop_button,
)

pytestmark = pytest.mark.slow

NARROW = {"width": 320, "height": 640}
TEXTS = [
    ".title",
    ".brand",
    "#new",
    "#theme",
    "#usage-text",
    ".hint",
    ".bubble",
    ".speaker",
    ".assistant p",
    ".assistant a",
    ".assistant p code",
    ".code-head span",
    ".code-head button",
    "pre code",
    *(f".hljs-{kind}" for kind in "comment keyword string number title deletion".split()),
    "th",
    "td",
    "blockquote p",
    ".stats",
    ".foot button",
    ".conversations a",
    "#send",
    ".field-hint",
    ".field label",
    ".facts dd",
    ".error-note p",
    ".error-note button",
    ".welcome p",
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_page: Open, scheme: str) -> None:
    """Text stands out from what is behind it by 4.5 to 1, in both themes."""
    page = open_page(color_scheme=scheme)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_text("tokens of context").wait_for()
    ratios = {".welcome p": contrast(page, ".welcome p")}
    ask(page, "everything please")
    page.evaluate(
        """async () => {
          const { ErrorNote } = await import("/static/error_note.js");
          const note = new ErrorNote({ retry() {}, stop() {} });
          note.update({ message: "No.", status: 400 }, true);
          document.querySelector(".assistant").append(note.element);
          for (const kind of ["comment", "keyword", "number", "title", "deletion"]) {
            const span = document.createElement("span");
            span.className = `hljs-${kind}`;
            document.querySelector("pre code").append(span);
          }
          for (const hidden of document.querySelectorAll(".error-note[hidden]")) hidden.remove();
        }"""
    )
    page.mouse.move(0, 0)
    for selector in TEXTS:
        if selector not in ratios:
            ratios[selector] = contrast(page, selector)
    assert {selector: ratio for selector, ratio in ratios.items() if ratio < 4.5} == {}


def test_dark(open_page: Open) -> None:
    """The system's theme applies until the user chooses one, which survives a reload."""
    page = open_page(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    theme = page.get_by_role("button", name="Theme")
    expect(theme).to_have_text("Theme: system")
    theme.click()
    expect(theme).to_have_text("Theme: light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.reload()
    expect(theme).to_have_text("Theme: light")
    assert page.locator("html").get_attribute("data-theme") == "light"
    theme.click()
    page.emulate_media(color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    theme.click()
    assert page.locator("html").get_attribute("data-theme") == "light"


def test_narrow_screen(open_page: Open) -> None:
    """At 320 pixels nothing scrolls sideways but code and tables in their own boxes."""
    page = open_page(viewport=NARROW)
    page.get_by_text("tokens of context").wait_for()
    assert_no_sideways_scroll(page)
    ask(page, "everything please " + "unbreakable" * 20)
    assert_no_sideways_scroll(page)
    code = page.locator(".code-block pre").first
    assert code.evaluate("(element) => element.scrollWidth > element.clientWidth")
    page.get_by_role("button", name="Edit message").click()
    assert_no_sideways_scroll(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings", exact=True).click()
    assert_no_sideways_scroll(page)
    page.get_by_role("button", name="Close settings").click()

    sizes = page.locator("button:visible").evaluate_all(
        "(all) => all.map((it) => [it.outerHTML.slice(0, 60), it.offsetWidth, it.offsetHeight])"
    )
    assert [size for size in sizes if min(size[1:]) < 24] == [], "too small for a finger"


def test_narrow_side_panel(open_page: Open) -> None:
    """The list of conversations opens over the messages; closed, it is out of the tab order."""
    page = open_page(viewport=NARROW)
    ask(page, "first talk")
    panel = page.get_by_role("navigation", name="Conversations")
    toggle = page.get_by_role("button", name="Conversations")
    expect(panel).to_have_count(0)
    toggle.click()
    expect(panel).to_be_visible()
    expect(toggle).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_role("button", name="New conversation")).to_be_focused()
    page.keyboard.press("Escape")
    expect(toggle).to_be_focused()
    expect(toggle).to_have_attribute("aria-expanded", "false")
    toggle.click()
    page.get_by_role("button", name="New conversation").click()
    expect(panel).to_have_count(0)
    expect(answers(page)).to_have_count(0)
    toggle.click()
    panel.get_by_role("link", name="first talk").click()
    expect(answers(page)).to_contain_text("You said: first talk")
    toggle.click()
    page.mouse.click(310, 300)
    expect(panel).to_have_count(0)


def test_large_text(open_page: Open) -> None:
    """Twice the text size still leaves space for messages and the input."""
    page = open_page(viewport={"width": 1280, "height": 1024})
    page.add_init_script(
        """document.addEventListener("DOMContentLoaded", () => {
          document.documentElement.style.fontSize = "32px";
        })"""
    )
    page.reload()
    ask(page, "table please")
    assert page.locator("#thread").evaluate("(element) => element.clientHeight") > 200
    expect(page.get_by_label("Message", exact=True)).to_be_in_viewport()


def test_reduced_motion(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    send(page, "wait please")
    expect(page.locator(".pulse")).to_be_visible()
    assert (
        page.locator(".pulse").evaluate("(element) => getComputedStyle(element).animationName")
        == "none"
    )
    stop_button(page).click()


def test_follows_only_at_the_bottom(page: Page) -> None:
    """The view follows a growing response; after scrolling up it stays, with a button back."""
    ask(page, "everything please")
    ask(page, "everything please")
    below = """() => {
      const { scrollHeight, scrollTop, clientHeight } = document.getElementById("thread");
      return scrollHeight - scrollTop - clientHeight;
    }"""
    send(page, "slow please")
    expect(answers(page).last).to_contain_text(re.compile("(slow ){200}"))
    assert page.evaluate(below) < 2
    page.mouse.move(600, 300)
    # The wheel scrolls by and by.
    page.evaluate(
        """() => {
          const thread = document.getElementById("thread");
          thread.addEventListener("scrollend", () => (window.hasScrolled = true));
          window.hasScrolled = false;
        }"""
    )
    page.mouse.wheel(0, -700)
    page.wait_for_function("() => window.hasScrolled")
    jump = page.get_by_role("button", name="Latest message")
    expect(jump).to_be_visible()
    top = page.evaluate("document.getElementById('thread').scrollTop")
    height = page.evaluate("document.getElementById('thread').scrollHeight")
    page.wait_for_function("(h) => document.getElementById('thread').scrollHeight > h", arg=height)
    assert page.evaluate("document.getElementById('thread').scrollTop") == top
    jump.click()
    expect(jump).to_be_hidden()
    assert page.evaluate(below) < 2
    stop_button(page).click()


def test_very_long_answer(page: Page) -> None:
    """However fast 1,800 tokens come, they are drawn once a frame, and all of them arrive."""
    page.evaluate(
        """() => {
          window.drawings = window.ticks = 0;
          const tick = () => requestAnimationFrame(tick, (window.ticks += 1));
          tick();
          const observer = new MutationObserver(() => (window.drawings += 1));
          const what = { childList: true, subtree: true, characterData: true };
          observer.observe(document.getElementById("messages"), what);
        }"""
    )
    answer = ask(page, "novel please")
    assert answer.locator("p").filter(has_text="Sentence").count() == 300
    # Sending and the end are drawn at once.
    assert page.evaluate("window.drawings <= window.ticks + 10")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(open_page: Open, scheme: str) -> None:
    """At 390 pixels, with a finger, every action is in sight or behind a button, in both themes."""
    page = open_page(color_scheme=scheme, **SCREENS["phone"])
    ask(page, "everything please")
    page.get_by_role("button", name="Regenerate").tap()
    versions = answers(page).get_by_role("group", name="Versions")
    versions.get_by_role("button", name="Previous version").tap()
    expect(versions).to_contain_text("1 / 2")
    assert contrast(page, ".version") >= 4.5
    for name in ("Copy answer", "Edit answer", "Attach text files", "Settings"):
        expect(page.get_by_role("button", name=name, exact=True)).to_be_in_viewport()
    page.get_by_role("button", name="Conversations").tap()
    panel = page.get_by_role("navigation", name="Conversations")
    for name in ("Rename everything please", "Delete everything please", "Import", "Export all"):
        button = panel.get_by_role("button", name=name)
        expect(button).to_be_in_viewport()
        assert button.evaluate("(it) => getComputedStyle(it).opacity") == "1"
    panel.get_by_role("searchbox").fill("everything")
    assert contrast(page, ".excerpt") >= 4.5
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings", exact=True).tap()
    page.get_by_label("JSON schema").fill("{}")
    page.get_by_role("button", name="Close settings").tap()
    page.evaluate("document.getElementById('prompt').blur()")
    assert_no_sideways_scroll(page)
