"""Versions of messages: edit, regenerate, continue; nothing is lost, in any tab."""

import json
import re

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import REFUSED, Errors
from tests.browser.scripted import Server
from tests.browser.steps import (
    CHAT,
    USAGE,
    answer_text,
    answer_with,
    answers,
    ask,
    edit,
    event,
    go,
    refuse_with,
    send,
    stop_button,
    stored,
    wait_for_end,
)

pytestmark = pytest.mark.slow


def text_of(answer: Locator) -> Locator:
    return answer.locator(":scope > .markdown")


def test_regenerated_answers_stay(page: Page) -> None:
    """Each answer is a version; the arrows lead to all, and a reload keeps the chosen one."""
    for word in ("one", "two", "three"):
        answer_with(page, [event({"content": word}), event({}, "stop"), USAGE])
        if word == "one":
            send(page, "count")
        else:
            page.get_by_role("button", name="Regenerate").click()
        expect(answers(page)).to_contain_text(word)
        wait_for_end(answers(page))
    versions = answers(page).get_by_role("group", name="Versions")
    expect(versions).to_contain_text("3 / 3")
    expect(versions.get_by_role("button", name="Next version")).to_be_disabled()
    go(answers(page), "Previous")
    expect(versions).to_contain_text("2 / 3")
    expect(text_of(answers(page))).to_have_text("two")
    page.reload()
    expect(versions).to_contain_text("2 / 3")
    expect(text_of(answers(page))).to_have_text("two")
    go(answers(page), "Previous")
    expect(text_of(answers(page))).to_have_text("one")
    expect(versions.get_by_role("button", name="Previous version")).to_be_disabled()


def test_edited_message_keeps_what_followed(page: Page, server: Server) -> None:
    """The old version leads back to its own answers; what is sent is the shown path."""
    for text in ("first", "second", "third"):
        ask(page, text)
    edit(page.locator("article.user").nth(1), "other")
    wait_for_end(answers(page).nth(1))
    expect(page.locator("article.user .bubble")).to_have_text(["first", "other"])
    ask(page, "after other")
    go(page.locator("article.user").nth(1), "Previous")
    expect(page.locator("article.user .bubble")).to_have_text(["first", "second", "third"])
    expect(text_of(answers(page).nth(2))).to_have_text("You said: third")
    ask(page, "after third")
    contents = [message["content"] for message in server.requests[-1]["messages"]]
    assert "other" not in contents and contents[-1] == "after third"
    go(page.locator("article.user").nth(1), "Next")
    expect(page.locator("article.user .bubble")).to_have_text(["first", "other", "after other"])
    assert len(stored(page)[0]["messages"]) == 12


def test_title_follows_the_first_message(page: Page) -> None:
    """After an edit and a change of version, unless the user gave a name."""
    ask(page, "first title")
    title = page.get_by_role("heading", level=1)
    edit(page.locator("article.user"), "second title")
    expect(title).to_have_text("second title")
    wait_for_end(answers(page))
    go(page.locator("article.user"), "Previous")
    expect(title).to_have_text("first title")
    page.get_by_role("button", name="Rename first title").click()
    page.get_by_role("textbox", name="Name").fill("mine")
    page.get_by_role("dialog").get_by_role("button", name="Rename").click()
    go(page.locator("article.user"), "Next")
    expect(title).to_have_text("mine")


def test_unfinished_edit_survives(page: Page) -> None:
    """A look at another conversation and a reload keep what was typed into an edit."""
    ask(page, "first")
    page.get_by_role("button", name="Edit message").click()
    page.get_by_role("textbox", name="Edit message").fill("half an ed")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "elsewhere")
    page.get_by_role("navigation").get_by_role("link", name="first").click()
    field = page.get_by_role("textbox", name="Edit message")
    expect(field).to_have_value("half an ed")
    page.reload()
    expect(field).to_have_value("half an ed")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".bubble")).to_have_text("first")
    page.reload()
    expect(page.locator(".bubble")).to_have_text("first")
    expect(field).to_have_count(0)


def test_edited_answer(page: Page, server: Server) -> None:
    """The user's text becomes a version of the answer, and is what the model sees next."""
    ask(page, "hello")
    edit(answers(page), "I said **this**.", kind="answer")
    expect(answers(page).locator("strong")).to_have_text("this")
    expect(answers(page)).to_contain_text("Edited.")
    expect(answers(page).get_by_role("group", name="Versions")).to_contain_text("2 / 2")
    ask(page, "and?")
    assert server.requests[-1]["messages"][1]["content"] == "I said **this**."
    go(answers(page).first, "Previous")
    expect(answers(page)).to_have_count(1)
    expect(text_of(answers(page))).to_have_text("You said: hello")


def test_continue_a_stopped_answer(page: Page) -> None:
    """The model continues its text: the answer is the prefix of the request, and grows in place."""
    answer_with(page, [event({"content": "One, "}), event({}, "length"), USAGE])
    send(page, "count")
    expect(answers(page)).to_contain_text("Stopped at the token limit.")
    page.unroute(CHAT)
    answer_with(page, [event({"content": "two."}), event({}, "stop"), USAGE])
    with page.expect_request(CHAT) as request:
        page.get_by_role("button", name="Continue").click()
    body = request.value.post_data_json
    assert body["messages"][-1] == {"role": "assistant", "content": "One, "}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    expect(answers(page).locator(":scope > .markdown")).to_have_text("One, two.")
    expect(answers(page).locator(".stats")).to_contain_text("24 tokens")
    expect(page.locator("#usage-text .tokens")).to_have_text("42 / 4,096 tokens")
    expect(page.get_by_role("button", name="Continue")).to_have_count(0)
    expect(answers(page).get_by_role("group", name="Versions")).to_be_hidden()


def test_statistics_of_a_stopped_answer(page: Page) -> None:
    """The server reports none; the page shows what it counted, as a lower bound."""
    send(page, "slow please")
    expect(answers(page)).to_contain_text("slow slow slow")
    stop_button(page).click()
    stats = answers(page).locator(".stats")
    expect(stats).to_have_text(re.compile(r"^at least \d+ tokens · [\d.,]+ tok/s$"))
    page.reload()
    expect(stats).to_have_text(re.compile(r"^at least \d+ tokens"))


def test_failed_answer_without_text_is_no_version(page: Page, errors: Errors) -> None:
    """Trying again replaces an empty failure; text that came before a failure stays."""
    errors.allow(REFUSED + "500")
    refuse_with(page, 500, "no", times=1)
    send(page, "hello")
    answers(page).get_by_role("button", name="Try again").click()
    wait_for_end(answers(page))
    expect(answers(page).get_by_role("group", name="Versions")).to_be_hidden()
    answer_with(page, [event({"content": "Half"})], is_complete=False)
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page).get_by_role("alert")).to_be_visible()
    page.unroute(CHAT)
    answers(page).get_by_role("button", name="Try again").click()
    wait_for_end(answers(page))
    expect(answers(page).get_by_role("group", name="Versions")).to_contain_text("3 / 3")


def test_second_tab(page: Page, server: Server) -> None:
    """It shows an answer of the first one as growing, can stop it, and loses none of its text."""
    send(page, "slow please")
    expect(answers(page)).to_contain_text("slow slow")
    expect(page).to_have_url(re.compile("#"))
    other = page.context.new_page()
    other.goto(page.url)
    expect(answers(other)).to_contain_text("slow")
    seen = len(answer_text(answers(other)))
    other.wait_for_function(
        "(n) => document.querySelector('.assistant > .markdown').innerText.length > n", arg=seen
    )
    expect(answers(other).get_by_text("Stopped.")).to_have_count(0)
    other.get_by_role("button", name="Rename slow please").click()
    other.get_by_role("textbox", name="Name").fill("named elsewhere")
    other.get_by_role("dialog").get_by_role("button", name="Rename").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("named elsewhere")
    # Regression: the first tab went on with the stored answer and lost all later text.
    seen = len(answer_text(answers(page)))
    page.wait_for_function(
        "(n) => document.querySelector('.assistant > .markdown').innerText.length > n + 50",
        arg=seen,
    )
    stop_button(other).click()
    server.wait_for_cancel()
    expect(answers(page)).to_contain_text("Stopped.")
    whole = answer_text(answers(page)).strip()
    assert len(whole) > seen
    expect(answers(other)).to_contain_text("Stopped.")
    expect(answers(other).locator(":scope > .markdown")).to_have_text(whole)
    other.reload()
    expect(answers(other).locator(":scope > .markdown")).to_have_text(whole)
    expect(other.get_by_role("heading", level=1)).to_have_text("named elsewhere")


def test_conversations_from_before_versions(page: Page) -> None:
    """Stored lists of messages without ids are shown, continued and kept."""
    old = {
        "id": "abc123",
        "title": "old",
        "system": "",
        "created": 1,
        "updated": 2,
        "messages": [
            {"role": "user", "content": "old"},
            {
                "role": "assistant",
                "content": "old answer",
                "reasoning": "",
                "toolCalls": [],
                "model": "m",
                "status": "done",
                "error": None,
                "usage": {
                    "promptTokens": 5,
                    "completionTokens": 7,
                    "cachedTokens": 0,
                    "prefillSeconds": None,
                    "tokensPerSecond": None,
                },
            },
        ],
    }
    page.evaluate(
        """(old) => new Promise((resolve) => {
          const opening = indexedDB.open("lowlat", 1);
          opening.onsuccess = () => {
            const change = opening.result.transaction("conversations", "readwrite");
            change.objectStore("conversations").put(JSON.parse(old));
            change.oncomplete = () => (opening.result.close(), resolve());
          };
        })""",
        json.dumps(old),
    )
    page.goto("/#abc123")
    page.reload()
    expect(answers(page)).to_contain_text("old answer")
    expect(page.locator("#usage-text .tokens")).to_have_text("12 / 4,096 tokens")
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_contain_text("You said: old")
    go(answers(page), "Previous")
    expect(answers(page)).to_contain_text("old answer")
