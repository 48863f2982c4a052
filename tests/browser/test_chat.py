"""Conversations: send, stream, stop, regenerate, edit, save."""

import json
import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import TIMEOUT, Open
from tests.browser.scripted import Server
from tests.browser.steps import (
    answer_text,
    answers,
    ask,
    send,
    stop_button,
    stored,
    users,
    wait_for_end,
)


def test_send_and_stream(page: Page, server: Server) -> None:
    """An answer grows on the page before it is finished, and ends with its figures."""
    send(page, "slow please")
    body = answers(page).locator(":scope > .markdown")
    expect(body).to_contain_text("slow slow")
    expect(page.locator("#rate")).to_contain_text("tok/s")
    seen = body.inner_text()
    page.wait_for_function(
        "(n) => document.querySelector('.assistant > .markdown').innerText.length > n",
        arg=len(seen),
    )
    stop_button(page).click()

    answer = ask(page, "hello")
    assert answer_text(answer) == "You said: hello"
    assert answer.locator("strong").inner_text() == "hello"
    assert re.search(r"\d+ tokens · .*tok/s · prompt \d+", answer.locator(".stats").inner_text())
    expect(page.locator("#usage-text")).to_contain_text(re.compile(r"^\d+ / 4,096 tokens"))
    expect(page.locator("#usage-text")).to_contain_text("kB")
    expect(page.locator("#rate")).to_be_empty()
    assert server.requests[-1]["messages"][-1] == {"role": "user", "content": "hello"}


def test_stop(page: Page, server: Server) -> None:
    """The stop button ends the answer here and on the server; what has come stays and is sent."""
    send(page, "slow please")
    expect(answers(page)).to_contain_text("slow slow")
    stop_button(page).click()
    expect(answers(page)).to_contain_text("Stopped.")
    partial = answer_text(answers(page).first)
    server.wait_for_cancel()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    ask(page, "and now?")
    sent = server.requests[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"].strip() == partial


def test_escape_stops(page: Page, server: Server) -> None:
    send(page, "slow please")
    expect(answers(page)).to_contain_text("slow slow")
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("Stopped.")
    server.wait_for_cancel()


def test_regenerate(page: Page, server: Server) -> None:
    """The same messages are sent again; earlier answers have no such button."""
    ask(page, "first")
    ask(page, "second")
    before = server.requests[-1]["messages"]
    buttons = page.get_by_role("button", name="Regenerate")
    expect(buttons).to_have_count(1)
    buttons.click()
    expect(answers(page)).to_have_count(2)
    wait_for_end(answers(page).nth(1))
    assert server.requests[-1]["messages"] == before
    assert answer_text(answers(page).nth(1)) == "You said: second"


def test_edit(page: Page, server: Server) -> None:
    """An edited message is sent in place of the old one and of everything after it."""
    for text in ("first", "second", "third"):
        ask(page, text)
    page.locator("article.user").nth(1).get_by_role("button", name="Edit message").click()
    field = page.get_by_role("textbox", name="Edit message")
    expect(field).to_be_focused()
    expect(field).to_have_value("second")
    field.fill("other")
    page.get_by_role("button", name="Save and send").click()
    expect(answers(page)).to_have_count(2)
    expect(answers(page).nth(1)).to_contain_text("You said: other")
    assert users(page) == ["first", "other"]
    contents = [message["content"] for message in server.requests[-1]["messages"]]
    assert contents == ["first", "You said: **first**", "other"]


def test_edit_cancelled(page: Page) -> None:
    """Esc leaves the message as it was."""
    ask(page, "first")
    page.get_by_role("button", name="Edit message").click()
    page.get_by_role("textbox", name="Edit message").fill("other")
    page.keyboard.press("Escape")
    assert users(page) == ["first"]
    expect(answers(page)).to_have_count(1)


def test_reload_keeps_everything(page: Page) -> None:
    """After a reload the same conversation is open, and an unsent text is there again."""
    ask(page, "table please")
    before = page.locator("#messages").inner_text()
    page.get_by_label("Message", exact=True).fill("not sent yet")
    page.reload()
    expect(page.locator("#messages table")).to_be_visible()
    assert page.locator("#messages").inner_text() == before
    expect(page.get_by_label("Message", exact=True)).to_have_value("not sent yet")
    expect(page.get_by_role("heading", level=1)).to_have_text("table please")


@pytest.mark.slow
def test_reload_while_streaming(page: Page, server: Server) -> None:
    """The partial text is saved, the server stops, and the user can regenerate."""
    send(page, "slow please")
    # Kept once a second.
    until = time.monotonic() + TIMEOUT / 1000
    while not any("slow" in record["messages"][1]["content"] for record in stored(page)):
        assert time.monotonic() < until, "nothing was saved"
        page.wait_for_timeout(50)
    page.reload()
    server.wait_for_cancel()
    expect(answers(page)).to_contain_text("slow")
    expect(answers(page)).to_contain_text("Stopped.")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


@pytest.mark.slow
def test_conversations(page: Page) -> None:
    """New ones begin empty; the list, the address and the back button lead to each."""
    ask(page, "first talk")
    page.get_by_role("button", name="New conversation").click()
    expect(answers(page)).to_have_count(0)
    ask(page, "second talk")
    links = page.get_by_role("navigation").get_by_role("link")
    expect(links).to_have_text(["second talk", "first talk"])
    links.nth(1).click()
    expect(answers(page)).to_contain_text("You said: first talk")
    expect(links.nth(1)).to_have_attribute("aria-current", "page")
    page.go_back()
    expect(answers(page)).to_contain_text("You said: second talk")


@pytest.mark.slow
def test_rename_and_delete(page: Page) -> None:
    ask(page, "first talk")
    page.get_by_role("button", name="This conversation").click()
    page.locator("#menu").get_by_role("button", name="Rename").click()
    page.get_by_role("textbox", name="Name").fill("A better name")
    page.get_by_role("dialog").get_by_role("button", name="Rename").click()
    links = page.get_by_role("navigation").get_by_role("link")
    expect(links).to_have_text(["A better name"])
    expect(page).to_have_title("A better name - lowlat")
    page.reload()
    expect(links).to_have_text(["A better name"])

    page.get_by_role("button", name="This conversation").click()
    page.locator("#menu").get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(links).to_have_count(1)
    page.get_by_role("button", name="This conversation").click()
    page.locator("#menu").get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(links).to_have_count(0)
    expect(answers(page)).to_have_count(0)
    page.reload()
    expect(links).to_have_count(0)


@pytest.mark.slow
def test_deleted_while_answering(page: Page, server: Server) -> None:
    """An answer under way does not bring its conversation back."""
    send(page, "slow please")
    expect(answers(page)).to_contain_text("slow slow")
    page.get_by_role("button", name="This conversation").click()
    page.locator("#menu").get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    server.wait_for_cancel()
    page.reload()
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_count(0)


@pytest.mark.slow
def test_export(page: Page) -> None:
    """Both files hold the conversation; the Markdown is the model's own."""
    ask(page, "table please")
    texts = {}
    for label in ("Markdown", "JSON"):
        page.get_by_role("button", name="This conversation").click()
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Export as {label}").click()
        texts[download.value.suggested_filename] = Path(download.value.path()).read_text()
    assert set(texts) == {"table-please.md", "table-please.json"}
    assert texts["table-please.md"].startswith(
        "# table please\n\n## You\n\ntable please\n\n## Answer\n\n| a | b |\n"
    )
    record = json.loads(texts["table-please.json"])
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"]


@pytest.mark.slow
def test_copy(page: Page) -> None:
    """Code and answers reach the clipboard as the model wrote them, also where http forbids it."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = ask(page, "table please")
    # "Copied" is shown for two seconds and stays readable for screen readers.
    page.evaluate("window.setTimeout = () => 0")
    paste, copied = "navigator.clipboard.readText()", page.get_by_role("button", name="Copied")
    answer.get_by_role("button", name="Copy code").click()
    expect(copied).to_have_count(1)
    assert page.evaluate(paste).startswith("print('a long line")
    answer.get_by_role("button", name="Copy answer").click()
    expect(copied).to_have_count(2)
    assert page.evaluate(paste).startswith("| a | b |\n|---|--:|\n")
    page.evaluate("Object.defineProperty(window, 'isSecureContext', { value: false })")
    page.get_by_role("button", name="Copy message").click()
    expect(copied).to_have_count(3)
    assert page.evaluate(paste) == "table please"


@pytest.mark.slow
def test_answer_continues_in_another_conversation(page: Page) -> None:
    """Looking at another conversation does not end an answer; coming back shows it growing."""
    send(page, "slow please")
    expect(answers(page)).to_contain_text("slow slow")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "meanwhile")
    link = page.get_by_role("navigation").get_by_role("link").filter(has_text="slow please")
    expect(link.get_by_role("img", name="answering")).to_be_visible()
    link.click()
    expect(stop_button(page)).to_be_visible()
    seen = len(answer_text(answers(page).first))
    page.wait_for_function(
        "(n) => document.querySelector('.assistant > .markdown').innerText.length > n", arg=seen
    )
    stop_button(page).click()
    expect(answers(page)).to_contain_text("Stopped.")


@pytest.mark.slow
def test_a_click_while_an_answer_ends(page: Page) -> None:
    """Regression: a list rebuilt between press and release, so that the click has no target."""
    ask(page, "first talk")
    page.get_by_role("button", name="New conversation").click()
    send(page, "slow please")
    links = page.get_by_role("navigation").get_by_role("link")
    expect(links.first.get_by_role("img", name="answering")).to_be_visible()
    links.filter(has_text="first talk").hover()
    page.mouse.down()
    stop_button(page).evaluate("(button) => button.click()")
    expect(links.first.get_by_role("img", name="answering")).to_have_count(0)
    page.mouse.up()
    expect(answers(page)).to_contain_text("You said: first talk")


@pytest.mark.slow
def test_two_tabs(page: Page) -> None:
    """A second tab hears of what the first one did."""
    other = page.context.new_page()
    other.goto("/")
    ask(page, "from the first tab")
    expect(other.get_by_role("navigation").get_by_role("link")).to_have_text(["from the first tab"])


@pytest.mark.slow
def test_sampling_settings(page: Page, server: Server) -> None:
    """Defaults, changed values, greedy without filters, reset; they outlast a reload."""
    ask(page, "one")
    sent = server.requests[-1]
    assert (sent["temperature"], sent["top_p"]) == (0.6, 0.95)
    assert not {"top_k", "min_p", "max_tokens", "seed"} & set(sent)

    page.get_by_role("button", name="Settings", exact=True).click()
    settings = page.get_by_role("complementary", name="Settings")
    settings.get_by_label("Temperature").fill("0.25")
    settings.get_by_label("Top k").fill("40")
    settings.get_by_label("Min p").fill("0.05")
    settings.get_by_label("Max tokens").fill("5")
    settings.get_by_label("Seed").fill("7")
    page.reload()
    expect(answers(page)).to_have_count(1)
    ask(page, "two")
    wanted = {
        "temperature": 0.25,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 5,
        "seed": 7,
    }
    assert wanted.items() <= server.requests[-1].items()
    expect(answers(page).last).to_contain_text("Stopped at the token limit.")

    page.get_by_role("button", name="Settings", exact=True).click()
    settings.get_by_label("Temperature").fill("0")
    expect(settings.get_by_label("Top p")).to_be_disabled()
    settings.get_by_label("Max tokens").fill("")
    ask(page, "three")
    assert server.requests[-1]["temperature"] == 0
    assert not {"top_p", "top_k", "min_p", "max_tokens"} & set(server.requests[-1])

    settings.get_by_role("button", name="Reset to defaults").click()
    expect(settings.get_by_label("Temperature")).to_have_value("0.6")
    ask(page, "four")
    assert server.requests[-1]["temperature"] == 0.6
    assert "seed" not in server.requests[-1]


def test_bad_sampling_value(page: Page, server: Server) -> None:
    """A value out of range is named at its field and not sent."""
    page.get_by_role("button", name="Settings", exact=True).click()
    field = page.get_by_label("Max tokens")
    field.fill("0")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_text("The last good value holds.")).to_be_visible()
    ask(page, "hello")
    assert "max_tokens" not in server.requests[-1]


def test_system_prompt(page: Page, server: Server) -> None:
    """It is sent first, shown folded above the messages, and new conversations begin with it."""
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System prompt").fill("Answer in rhyme.")
    ask(page, "hello")
    assert server.requests[-1]["messages"][0] == {"role": "system", "content": "Answer in rhyme."}
    page.locator(".system-note summary").click()
    expect(page.locator(".system-note p")).to_have_text("Answer in rhyme.")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "again")
    assert server.requests[-1]["messages"][0]["role"] == "system"


def test_model_without_chat_template(open_page: Open, plain_server: Server) -> None:
    """The page shows that and continues the text instead; Enter alone continues it."""
    page = open_page(at=plain_server)
    expect(page.locator("#notice")).to_contain_text("no chat template")
    answer = ask(page, "Once upon")
    assert answer_text(answer) == "You said: Once upon"
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    send(page, "")
    expect(answers(page)).to_have_count(2)
    wait_for_end(answers(page).nth(1))
    assert plain_server.requests[-1]["prompt"] == "Once uponYou said: **Once upon**"
