"""Settings next to sampling: penalties, stop strings, JSON schema, thinking."""

import json

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import Open
from tests.browser.scripted import Server
from tests.browser.steps import CHAT, USAGE, answer_with, answers, ask, event, send

pytestmark = pytest.mark.slow


def test_penalties_and_stop_strings(page: Page, server: Server) -> None:
    """Only what differs from the default is sent; the settings outlast a reload."""
    ask(page, "one")
    names = {"presence_penalty", "frequency_penalty", "repetition_penalty", "stop"}
    assert not names & set(server.requests[-1])
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Presence penalty").fill("0.5")
    page.get_by_label("Frequency penalty").fill("-0.25")
    page.get_by_label("Repetition penalty").fill("1.1")
    page.get_by_label("Stop strings").fill("END\n\\n\\n\n\\\\n")
    page.reload()
    expect(answers(page)).to_have_count(1)
    ask(page, "two")
    sent = server.requests[-1]
    assert {name: sent[name] for name in names} == {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.1,
        "stop": ["END", "\n\n", "\\n"],
    }
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Stop strings").fill("\n".join("abcdefghijklmnopq"))
    expect(page.get_by_text("At most 16 stop strings.")).to_be_visible()
    page.get_by_role("button", name="Reset to defaults").click()
    expect(page.get_by_label("Stop strings")).to_have_value("")
    ask(page, "three")
    assert not names & set(server.requests[-1])


def test_schema(page: Page) -> None:
    """A JSON schema constrains answers; what is none is named at the field and not sent."""
    page.get_by_role("button", name="Settings", exact=True).click()
    field = page.get_by_label("JSON schema")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    field.fill(json.dumps(schema))
    answer_with(page, [event({"content": "{}"}), event({}, "stop"), USAGE])
    for text in (json.dumps(schema), "[1]", '{"type": '):
        field.fill(text)
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_text("The last good value holds.")).to_be_visible()
    with page.expect_request(CHAT) as request:
        send(page, "hello")
    assert request.value.post_data_json["structured_outputs"] == {"json": schema}


def test_thinking(open_page: Open) -> None:
    """The switch is there if the model's template has one, by the template's name for it."""
    page = open_page()
    card = {"id": "tiny", "max_model_len": 4096, "has_chat_template": True}
    names: list[str] = []

    def answer(route: Route) -> None:
        route.fulfill(json={"data": [{**card, "chat_template_kwargs": names}]})

    page.context.route("**/v1/models", answer)
    page.reload()
    page.get_by_role("button", name="Settings", exact=True).click()
    expect(page.get_by_label("JSON schema")).to_be_visible()
    field = page.get_by_label("Thinking")
    expect(field).to_be_hidden()
    answer_with(page, [event({"content": "Yes."}), event({}, "stop"), USAGE])
    names.extend(["clear_thinking", "thinking"])
    page.reload()
    page.get_by_role("button", name="Settings", exact=True).click()
    for value in ("off", "on"):
        field.select_option(value)
        page.get_by_role("button", name="New conversation").click()
        with page.expect_request(CHAT) as request:
            send(page, "hello")
        assert request.value.post_data_json["chat_template_kwargs"] == {"thinking": value == "on"}


def test_settings_reach_the_server(page: Page, server: Server) -> None:
    """The server takes penalties, stop strings and a schema as the page spells them."""
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Presence penalty").fill("1")
    page.get_by_label("JSON schema").fill('{"type": "object"}')
    ask(page, "hello")
    assert server.requests[-1]["structured_outputs"] == {"json": {"type": "object"}}
