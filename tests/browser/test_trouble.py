"""The page when the server refuses, breaks off or is down; reasoning and tool calls.

Answers here are made in the browser's network layer, in the server's own shape.
"""

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import BROKEN, REFUSED, Errors, Open
from tests.browser.steps import (
    CHAT,
    USAGE,
    answer_text,
    answer_with,
    answers,
    event,
    record_texts,
    refuse_with,
    send,
    users,
    wait_for_end,
)

pytestmark = pytest.mark.slow


def test_reasoning_is_folded(page: Page) -> None:
    """It stands folded above the answer with its duration, opens on demand, is not sent again."""
    thoughts = [event({"reasoning_content": f"Thought *{n}*.\n\n"}) for n in range(40)]
    answer_with(page, [*thoughts, event({"content": "Because."}), event({}, "stop"), USAGE])
    send(page, "why?")
    answer = answers(page)
    wait_for_end(answer)
    expect(answer).to_contain_text("Because.")
    summary = answer.locator("summary")
    assert summary.inner_text().startswith("Thought for ")
    expect(answer.locator("details .markdown")).to_be_hidden()
    assert answer.locator("details .markdown *").count() == 0, "folded text need not be made"
    summary.click()
    expect(answer.locator("details em")).to_have_count(40)
    assert answer_text(answer) == "Because."
    with page.expect_request(CHAT) as request:
        send(page, "and?")
    assert request.value.post_data_json["messages"][1] == {
        "role": "assistant",
        "content": "Because.",
    }


def test_usage_of_the_last_chunk(page: Page) -> None:
    """Speed, cached tokens and the context in use are the server's own figures."""
    answer_with(page, [event({"content": "Yes."}), event({}, "stop"), USAGE])
    send(page, "really?")
    stats = answers(page).locator(".stats")
    expect(stats).to_have_text("12 tokens · 5.5 tok/s · prompt 30, 16 from cache in 0.25 s")
    expect(page.locator("#usage-text .tokens")).to_have_text("42 / 4,096 tokens")
    expect(page.locator("#usage-text .cache")).to_contain_text("cache")


def test_tool_calls(page: Page) -> None:
    """Calls are shown with their arguments as they come, piece by piece."""
    start = {
        "index": 0,
        "id": "a",
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    pieces = [
        {"index": 0, "function": {"arguments": part}} for part in ('{"city": ', '"<b>Lisbon</b>"}')
    ]
    calls = [event({"tool_calls": [call]}) for call in (start, *pieces)]
    answer_with(page, [*calls, event({}, "tool_calls"), USAGE])
    send(page, "weather?")
    call = answers(page).locator(".tool-call")
    expect(call).to_contain_text("Calls")
    expect(call.locator("p code")).to_have_text("weather")
    expect(call.locator("pre")).to_have_text('{"city": "<b>Lisbon</b>"}')


def test_refusal(page: Page, errors: Errors) -> None:
    """The server's message stands in the answer's place, as text, with a way to try again."""
    errors.allow(REFUSED + "400")
    refuse_with(page, 400, "messages: <b>too long</b>; shorten them", times=1)
    send(page, "hello")
    alert = answers(page).get_by_role("alert")
    expect(alert).to_have_text("messages: <b>too long</b>; shorten them")
    answers(page).get_by_role("button", name="Try again").click()
    expect(answers(page)).to_contain_text("You said: hello")
    expect(answers(page)).to_have_count(1)
    assert users(page) == ["hello"]


def test_busy_server(page: Page, errors: Errors) -> None:
    """429 counts down Retry-After and then tries again by itself."""
    errors.allow(REFUSED + "429")
    refuse_with(page, 429, "The queue is full.", times=1, **{"Retry-After": "2"})
    alerts = record_texts(page, ".assistant [role=alert]")
    countdown = record_texts(page, ".assistant .countdown")
    send(page, "hello")
    expect(answers(page)).to_contain_text("You said: hello")
    expect(answers(page)).to_have_count(1)
    expect(answers(page).get_by_role("alert")).to_have_count(0)
    assert alerts() == ["The queue is full."]
    assert {"Trying again in 2 s", "Trying again in 1 s"} & set(countdown())


def test_waiting_can_be_given_up(page: Page, errors: Errors) -> None:
    """Esc ends the countdown; the message stays with its button."""
    errors.allow(REFUSED + "429")
    refuse_with(page, 429, "The queue is full.", times=1, **{"Retry-After": "3600"})
    send(page, "hello")
    expect(answers(page).locator(".countdown")).to_be_visible()
    page.keyboard.press("Escape")
    expect(answers(page).locator(".countdown")).to_be_hidden()
    answers(page).get_by_role("button", name="Try again").click()
    expect(answers(page)).to_contain_text("You said: hello")


def test_broken_stream(page: Page) -> None:
    """The text before the break stays, and the page shows that it is incomplete."""
    answer_with(page, [event({"content": "The first half"})], is_complete=False)
    send(page, "hello")
    expect(answers(page)).to_contain_text("The first half")
    expect(answers(page).get_by_role("alert")).to_contain_text("before it was complete")


def test_error_within_a_stream(page: Page) -> None:
    """An error event of the server is shown like any other refusal."""
    failure = {"error": {"message": "the engine stopped", "type": "server_error"}}
    answer_with(page, [event({"content": "Half"}), failure])
    send(page, "hello")
    expect(answers(page).get_by_role("alert")).to_have_text("the engine stopped")
    expect(answers(page)).to_contain_text("Half")


def test_server_away(page: Page, errors: Errors) -> None:
    """An unreachable server and a rejection have different messages."""
    errors.allow(BROKEN)
    page.route(CHAT, lambda route: route.abort(), times=1)
    send(page, "hello")
    expect(answers(page).get_by_role("alert")).to_have_text("The server cannot be reached.")


def test_other_model_after_a_restart(page: Page, errors: Errors) -> None:
    """If the server has another model by now, the page fetches its name before it tries again."""
    errors.allow(REFUSED + "404")
    refuse_with(page, 404, "the model 'tiny' does not exist; this server has 'other'", times=1)
    other = {"id": "other", "max_model_len": 9, "has_chat_template": True}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [other]}))
    send(page, "hello")
    expect(answers(page).get_by_role("alert")).to_contain_text("does not exist")
    with page.expect_request(lambda request: request.url.endswith("completions")) as request:
        answers(page).get_by_role("button", name="Try again").click()
    assert request.value.post_data_json["model"] == "other"


def test_models_unknown(open_page: Open, errors: Errors) -> None:
    """Without a model the page shows why, and sends the message once it has fetched one."""
    errors.allow(REFUSED + "503")
    page = open_page()
    page.route(
        "**/v1/models",
        lambda route: route.fulfill(status=503, json={"error": {"message": "Shutting down."}}),
    )
    page.reload()
    expect(page.locator("#notice")).to_contain_text("Shutting down.")
    send(page, "hello")
    expect(page.get_by_label("Message", exact=True)).to_have_value("hello")
    page.unroute("**/v1/models")
    page.locator("#notice").get_by_role("button", name="Try again").click()
    expect(page.locator("#notice")).to_be_hidden()
    expect(answers(page)).to_contain_text("You said: hello")


def test_no_storage(open_page: Open) -> None:
    """Without storage the page works and shows that conversations are not saved."""
    page = open_page()
    page.add_init_script(
        """Object.defineProperty(window, "indexedDB", {
          value: { open() { throw new Error("no"); } },
        })"""
    )
    page.reload()
    expect(page.locator("#storage-note")).to_contain_text("Conversations are not saved")
    send(page, "hello")
    expect(answers(page)).to_contain_text("You said: hello")
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_text(["hello"])


def test_hostile_answer(page: Page) -> None:
    """An answer full of HTML is text on the page; nothing runs and nothing is fetched."""
    evil = (
        "<img src='https://evil.example/x' onerror='window.pwned=1'> "
        "[a](javascript:window.pwned=1) ![b](https://evil.example/y)"
    )
    answer_with(
        page,
        [event({"reasoning_content": evil}), event({"content": evil}), event({}, "stop"), USAGE],
    )
    send(page, evil)
    wait_for_end(answers(page))
    expect(answers(page)).to_contain_text("<img src='https://evil.example/x'")
    answers(page).locator("summary").click()
    assert page.locator("#messages img").count() == 0
    assert page.evaluate("window.pwned") is None
    page.reload()
    expect(answers(page)).to_contain_text("<img src='https://evil.example/x'")
    assert page.evaluate("window.pwned") is None
