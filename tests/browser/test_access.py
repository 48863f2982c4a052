"""Accessibility: keyboard and screen reader."""

import pytest
from playwright.sync_api import Page, expect

from tests.browser.scripted import Server
from tests.browser.steps import answer_text, answers, ask


@pytest.mark.slow
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


@pytest.mark.slow
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
        "search",
        "table please",
        "Rename table please",
        "Delete table please",
        "theme",
        "import",
        "export",
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
        "Edit answer",
        "Attach text files",
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
    """The accessibility tree: every control, group and dialog has a name."""
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


@pytest.mark.slow
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
