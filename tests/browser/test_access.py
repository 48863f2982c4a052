"""For everyone: keyboard, screen reader, contrast, dark, narrow screens, motion, scrolling."""

import re

import pytest
from playwright.sync_api import Page, expect

from browser.conftest import Open
from browser.scripted import Server
from browser.steps import answer_text, answers, ask, contrast, send, stop_button

NARROW = {"width": 320, "height": 640}


def test_keyboard_alone(page: Page, server: Server) -> None:
    """A conversation without a mouse: ask, stop, regenerate, edit, copy, begin another, go back."""
    press = page.keyboard.press
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("slow please")
    press("Shift+Enter")
    page.keyboard.type("second line")
    press("Enter")
    expect(answers(page)).to_contain_text("slow slow")
    press("Escape")
    expect(answers(page)).to_contain_text("Stopped.")
    server.wait_for_cancel()
    assert server.requests[-1]["messages"][0]["content"] == "slow please\nsecond line"

    press("Alt+KeyU")
    expect(page.get_by_role("textbox", name="Edit message")).to_be_focused()
    press("Control+KeyA")
    page.keyboard.type("hello")
    press("Enter")
    expect(answers(page).locator(".stats")).to_contain_text("token")
    assert answer_text(answers(page).first) == "You said: hello"
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    press("Alt+KeyR")
    expect(answers(page).locator(".stats")).to_contain_text("token")

    press("Alt+KeyN")
    expect(answers(page)).to_have_count(0)
    page.keyboard.type("another")
    press("Enter")
    expect(answers(page)).to_contain_text("You said: another")
    press("Alt+ArrowDown")
    expect(answers(page)).to_contain_text("You said: hello")
    press("Control+Slash")
    expect(page.get_by_role("dialog", name="Keyboard and help")).to_be_visible()
    press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    press("Alt+KeyS")
    expect(page.get_by_label("System prompt")).to_be_focused()
    press("Escape")
    expect(page.get_by_role("button", name="Settings", exact=True)).to_be_focused()


def test_composing_does_not_send(page: Page) -> None:
    """The Enter that ends the composition of a character (as in Japanese) sends nothing."""
    field = page.get_by_label("Message", exact=True)
    field.fill("にほん")
    field.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    field.dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
    expect(field).to_have_value("にほん")
    expect(answers(page)).to_have_count(0)


def test_tab_order(page: Page) -> None:
    """Tab reaches every control once, from the skip link through the messages to the field."""
    ask(page, "table please")
    link = page.get_by_role("navigation").get_by_role("link")
    expect(link).to_have_accessible_name("table please")
    page.locator("#skip").focus()
    names = ["skip"]
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate(
            """() => {
              const at = document.activeElement;
              if (at === document.body) return null;
              return at.getAttribute("aria-label") ?? (at.id || at.innerText);
            }"""
        )
        if name is None or name in names:
            break
        names.append(name)
    wanted = [
        "skip",
        "new",
        "table please",
        "theme",
        "open-help",
        "This conversation",
        "Settings",
        "Messages",
    ]
    wanted += [
        "Edit message",
        "Copy message",
        "Table",
        "Copy code",
        "Code, python",
        "Copy answer",
        "Regenerate",
    ]
    assert names == [*wanted, "prompt", "Send"]


def test_skip_link(page: Page) -> None:
    """Out of sight until it is reached by keyboard; then it leads past both panels."""
    link = page.get_by_role("link", name="Skip to the message field")
    expect(link).not_to_be_in_viewport()
    link.focus()
    expect(link).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_structure(page: Page) -> None:
    """Landmarks, one title, a heading for each message, levels without a gap."""
    ask(page, "table please")
    page.get_by_role("button", name="Settings", exact=True).click()
    expect(page.get_by_role("navigation", name="Conversations")).to_be_visible()
    expect(page.get_by_role("main")).to_be_visible()
    expect(page.get_by_role("complementary", name="Settings")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    expect(page.locator("article h2")).to_have_text(["You", "tiny"])
    assert page.locator("html").get_attribute("lang") == "en"
    ids = page.locator("[id]").evaluate_all("(all) => all.map((element) => element.id)")
    assert len(ids) == len(set(ids))
    dangling = page.evaluate(
        """() => ["for", "aria-labelledby", "aria-describedby", "aria-controls"].flatMap((name) =>
          [...document.querySelectorAll(`[${name}]`)].map((element) => element.getAttribute(name))
        ).filter((id) => !document.getElementById(id))"""
    )
    assert dangling == []


def test_every_control_has_a_name(page: Page) -> None:
    """As the browser tells it to a screen reader: no control, group or dialog is nameless."""
    ask(page, "table please")
    page.get_by_role("button", name="Settings", exact=True).click()
    page.locator("article.user").get_by_role("button", name="Edit message").click()
    client = page.context.new_cdp_session(page)
    for dialog in (None, "help", "rename", "confirm-delete"):
        if dialog:
            page.evaluate("(id) => document.getElementById(id).showModal()", dialog)
        nodes = client.send("Accessibility.getFullAXTree")["nodes"]
        seen = {
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        }
        roles = {
            "button",
            "link",
            "textbox",
            "slider",
            "spinbutton",
            "combobox",
            "checkbox",
            "dialog",
            "group",
        }
        roles |= {"navigation", "complementary", "region", "img", "image"}
        nameless = [role for role, name in seen if role in roles and not name.strip()]
        assert not nameless, (dialog, nameless)
        assert len(seen) > 10
        if dialog:
            page.evaluate("(id) => document.getElementById(id).close()", dialog)


def test_announcements(page: Page) -> None:
    """A screen reader hears that the answer began and the finished answer, not each token."""
    page.evaluate(
        """() => {
          window.heard = [];
          const region = document.getElementById("announcer");
          new MutationObserver(() => region.textContent && window.heard.push(region.textContent))
            .observe(region, { childList: true, characterData: true, subtree: true });
        }"""
    )
    ask(page, "count please")
    page.wait_for_function("() => window.heard.length >= 2")
    heard = page.evaluate("window.heard")
    assert len(heard) == 2
    assert heard[0] == "Sent. The model is answering."
    assert heard[1].startswith("Answer: 0 1 2 3")
    live = page.locator(":is([aria-live], [role=status], [role=log], [role=alert])")
    live = live.filter(has=page.locator(".markdown")).count()
    assert live == 0, "the growing answer must not be live itself"


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
          for (const hidden of document.querySelectorAll(".error-note[hidden]")) hidden.remove();
        }"""
    )
    page.mouse.move(0, 0)
    for selector in TEXTS:
        if selector not in ratios:
            ratios[selector] = contrast(page, selector)
    assert {selector: ratio for selector, ratio in ratios.items() if ratio < 4.5} == {}


def test_dark(open_page: Open) -> None:
    """The system's choice holds until the user makes one, which a reload keeps."""
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


def assert_no_sideways_scroll(page: Page) -> None:
    width = page.evaluate(
        "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    )
    assert width == 320
    thread = page.locator("#thread")
    assert thread.evaluate("(element) => element.scrollWidth <= element.clientWidth")
    sticking_out = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((element) => {
          const { left, right, width } = element.getBoundingClientRect();
          // What lies in a box with its own scroll bar may be wider.
          const isApart = element.closest("pre, .table-wrap, .visually-hidden");
          return width > 0 && (left < -1 || right > innerWidth + 1) && !isApart;
        }).map((element) => element.outerHTML.slice(0, 80))"""
    )
    assert sticking_out == []


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
    """Twice the text size still leaves room for messages and field."""
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
    """A growing answer is followed; a reader who scrolled up stays there and can jump back."""
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
