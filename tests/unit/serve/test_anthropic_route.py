"""POST /v1/messages and /v1/messages/count_tokens: conversion to chats, blocks, events, errors."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.serve.app import build_app, make_state
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.chat.template_features import TemplateFeatures
from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import Draining, EngineDead, Overloaded
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.hints import HEADER
from lowlat.serve.routes.anthropic import MessageObject
from lowlat.serve.routes.anthropic_request import CountTokensRequest, MessagesRequest, as_chat
from tests.abuse.local import NAME as COUNTING
from tests.abuse.local import counting_model

from .conftest import URL, MakeClient
from .fake_engine import NAME, Answer, FakeEngine, tiny
from .templates import tokenizer_of

PATH = "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]
BODY: dict[str, Any] = {"model": NAME, "messages": HI, "max_tokens": 9}
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}


def events_of(text: str) -> list[dict[str, Any]]:
    """Data of the events of a stream; each carries its type twice."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def tools_client(engine: FakeEngine, make_client: MakeClient, family: str) -> TestClient:
    """A client of a model with the chat template of `family`."""
    engine.model = tiny(tokenizer_of(family), context=4096)
    return make_client()


def chat_of(family: str = "hermes", **fields: Any) -> dict[str, Any]:
    """The chat of a request, without what is unset."""
    request = MessagesRequest.model_validate({**BODY, **fields})
    chat = as_chat(TemplateFeatures.of(tokenizer_of(family)), request)
    return chat.model_dump(exclude_none=True, by_alias=True)


def test_complete_message(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post(PATH, json={**BODY, "system": "Be kind", "top_k": 5}).json()
    MessageObject.model_validate(answer)
    assert answer["content"] == [{"type": "text", "text": "Hello"}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    asked = engine.asked[0]
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(asked.prompt)
    assert (usage["cache_read_input_tokens"], usage["output_tokens"]) == (3, 5)
    assert (asked.params.max_tokens, asked.params.top_k) == (9, 5)
    assert b"Be kind" in bytes(id for id in asked.prompt if id < 256)


def test_events_of_a_message(client: TestClient) -> None:
    response = client.post(PATH, json={**BODY, "stream": True})
    events = events_of(response.text)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert "".join(event["delta"]["text"] for event in events[3:-3]) == "Hello"
    started = events[0]["message"]
    assert (started["content"], started["stop_reason"]) == ([], None)
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    total = started["usage"]["input_tokens"] + started["usage"]["cache_read_input_tokens"]
    final = events[-2]["usage"]
    assert final["input_tokens"] + final["cache_read_input_tokens"] == total
    assert final["output_tokens"] == 5


def test_thinking_and_tool_calls(engine: FakeEngine, make_client: MakeClient) -> None:
    client = tools_client(engine, make_client, "hermes")
    engine.answer = Answer(
        text='<think>Well</think>\nSure<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n'
        "</tool_call>"
    )
    body = {**BODY, "tools": [TOOL]}
    answer = client.post(PATH, json=body).json()
    thinking, text, call = answer["content"]
    assert thinking == {"type": "thinking", "thinking": "Well", "signature": ""}
    assert text == {"type": "text", "text": "Sure"}
    assert (call["name"], call["input"]) == ("f", {"a": 3})
    assert answer["stop_reason"] == "tool_use"
    events = events_of(client.post(PATH, json={**body, "stream": True}).text)
    opened = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    assert [block["type"] for block in opened] == ["thinking", "text", "tool_use"]
    assert opened[2]["input"] == {}
    assert [e["index"] for e in events if e["type"] == "content_block_stop"] == [0, 1, 2]
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert json.loads("".join(d.get("partial_json", "") for d in deltas)) == {"a": 3}
    # What was answered can be sent back.
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "ok"}
    turns = [{"role": "assistant", "content": answer["content"]}]
    turns += [{"role": "user", "content": [result]}]
    assert client.post(PATH, json={**body, "messages": HI + turns}).status_code == 200


def test_a_call_that_is_cut_off_keeps_what_is_complete(
    engine: FakeEngine, make_client: MakeClient
) -> None:
    client = tools_client(engine, make_client, "hermes")
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 3, "b": [1, "x'
    engine.answer = Answer(text=text, finish_reason="length")
    answer = client.post(PATH, json={**BODY, "tools": [TOOL]}).json()
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"][0]["input"] == {"a": 3, "b": [1]}


def test_max_tokens_is_reduced_to_the_context(client: TestClient, engine: FakeEngine) -> None:
    """Claude Code asks for 32,000 by default."""
    response = client.post(PATH, json={**BODY, "max_tokens": 32000})
    assert response.status_code == 200
    asked = engine.asked[0]
    assert len(asked.prompt) + (asked.params.max_tokens or 0) == engine.model.context


def test_a_prompt_that_overflows_is_an_error(client: TestClient, engine: FakeEngine) -> None:
    long = [{"role": "user", "content": "x" * engine.model.context}]
    response = client.post(PATH, json={**BODY, "messages": long})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    # It can be counted.
    count = client.post(f"{PATH}/count_tokens", json={"model": NAME, "messages": long}).json()
    sizes = f"{count['input_tokens']} tokens > {engine.model.context} maximum"
    assert message.startswith(f"This model's maximum context length is {engine.model.context} ")
    assert f"prompt is too long: {sizes}" in message


def test_tokens_are_counted_as_they_are_sent(client: TestClient, engine: FakeEngine) -> None:
    body = {"model": NAME, "messages": HI, "system": [{"type": "text", "text": "Be kind"}]}
    count = client.post(f"{PATH}/count_tokens?beta=true", json=body).json()
    assert client.post(PATH, json={**body, "max_tokens": 1}).status_code == 200
    assert count == {"input_tokens": len(engine.asked[0].prompt)}


def test_blocks_become_messages() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "d"}, CALL]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True},
                {"type": "text", "text": "e"},
            ],
        },
    ]
    system = [{"type": "text", "text": "x-anthropic-billing-header: v=1"}]
    system += [{"type": "text", "text": "s"}, {"type": "text", "text": "t"}]
    chat = chat_of(messages=turns, system=system, tools=[TOOL])
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert chat["messages"] == [
        {"role": "system", "content": "s\nt"},
        {"role": "user", "content": "a\nb\nc"},
        {
            "role": "assistant",
            "content": "d",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "Error: no", "tool_call_id": "t1"},
        {"role": "user", "content": "e"},
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("hermes", {"role": "system", "content": "now"}),
        ("mistral", {"role": "user", "content": "Hi\n<system-reminder>\nnow\n</system-reminder>"}),
    ],
)
def test_later_system_messages(family: str, expected: dict[str, str]) -> None:
    turns = [*HI, {"role": "system", "content": "now"}]
    assert chat_of(family, messages=turns)["messages"][-1] == expected


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "f"},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
    ],
)
def test_tool_choices(choice: dict[str, Any], expected: dict[str, Any]) -> None:
    chat = chat_of(tools=[TOOL], tool_choice=choice)
    given = {name: chat[name] for name in ("tool_choice", "parallel_tool_calls") if name in chat}
    assert given == expected


def test_a_forced_call_needs_tools() -> None:
    with pytest.raises(RequestError, match="tool_choice requires tools"):
        chat_of(tool_choice={"type": "any"})


@pytest.mark.parametrize(
    ("family", "kind", "variables"),
    [
        ("hermes", "enabled", {"enable_thinking": True}),
        ("hermes", "disabled", {"enable_thinking": False}),
        ("v3.1", "adaptive", {"thinking": True}),
        ("llama", "enabled", None),
    ],
)
def test_thinking_sets_the_template(
    family: str, kind: str, variables: dict[str, bool] | None
) -> None:
    assert chat_of(family, thinking={"type": kind}).get("chat_template_kwargs") == variables


def test_stop_sequences(client: TestClient, engine: FakeEngine) -> None:
    client.post(PATH, json={**BODY, "stop_sequences": ["ll", "x"]})
    assert engine.asked[0].params.stop == ("ll", "x")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_on_a_stop_sequence(stream: bool) -> None:
    """The model counts letters."""
    state = make_state(AsyncEngine(counting_model()), ServeConfig())
    body = {**BODY, "model": COUNTING, "stop_sequences": ["x", "def"], "temperature": 0}
    with TestClient(build_app(state), base_url=URL) as client:
        response = client.post(PATH, json={**body, "stream": stream})
    if stream:
        events = events_of(response.text)
        pieces = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        text, end = "".join(piece["text"] for piece in pieces), events[-2]["delta"]
    else:
        end = response.json()
        text = end["content"][0]["text"]
    assert text == "abc"
    assert (end["stop_reason"], end["stop_sequence"]) == ("stop_sequence", "def")


def test_hints_are_named(engine: FakeEngine, make_client: MakeClient) -> None:
    hints = {
        "metadata": {"user_id": "u"},
        "context_management": {"edits": []},
        "thinking": {"type": "adaptive", "budget_tokens": 99},
        "output_config": {"effort": "max"},
        "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
    }
    # Without a reasoning_effort in the template, thinking alone decides.
    without = {"context_management", "metadata", "output_config.effort"}
    without |= {"system.cache_control", "thinking.budget_tokens"}
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "effort-2025-11-24"}
    client = tools_client(engine, make_client, "hermes")
    response = client.post(f"{PATH}?beta=true", json={**BODY, **hints}, headers=headers)
    assert set(response.headers[HEADER].split(", ")) == without
    client = tools_client(engine, make_client, "llama")
    response = client.post(PATH, json={**BODY, **hints})
    assert set(response.headers[HEADER].split(", ")) == {*without, "thinking"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
        (
            {"messages": [*HI, {"role": "assistant", "content": ""}]},
            "messages requires an assistant message with text at the end",
        ),
        ({"stop_sequences": ["", "x"]}, "stop_sequences[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].type must be one of 'text', 'tool_result', got 'image'",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking"}]}]},
            "messages[0].content[0].type",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL]}, "tools: this model's chat template has no known tool-call format"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}
                ]
            },
            "messages",
        ),
    ],
)
def test_refusals_name_the_field(client: TestClient, change: dict[str, Any], message: str) -> None:
    response = client.post(PATH, json={**BODY, **change})
    assert response.status_code == 400
    assert response.json()["type"] == "error"
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (Overloaded(7), 429, "rate_limit_error"),
        (Draining(), 529, "overloaded_error"),
        (EngineDead("x"), 529, "overloaded_error"),
        (ZeroDivisionError(), 500, "api_error"),
    ],
)
def test_failures_have_its_shape(
    client: TestClient, engine: FakeEngine, refusal: Exception, status: int, kind: str
) -> None:
    engine.refusal = refusal
    response = client.post(PATH, json=BODY)
    assert response.status_code == status
    assert (response.json()["type"], response.json()["error"]["type"]) == ("error", kind)
    assert ("retry-after" in response.headers) == (status in (429, 529))


def test_refusals_before_the_route_have_its_shape(make_client: MakeClient) -> None:
    client = make_client(api_keys=("k" * 32,), max_body_bytes=1024)
    key = {"x-api-key": "k" * 32}
    replies = [
        (client.post(PATH, json=BODY), 401, "authentication_error"),
        (client.post(f"{PATH}/nothing", json=BODY, headers=key), 404, "not_found_error"),
        (client.get(PATH, headers=key), 405, "invalid_request_error"),
        (client.post(PATH, json={"x": "y" * 1024}, headers=key), 413, "request_too_large"),
        (client.post(PATH, content=b"{}", headers=key), 415, "invalid_request_error"),
        (client.post(f"{PATH}?a=b", json={}, headers=key), 400, "invalid_request_error"),
        (client.post(PATH, json={}, headers={**key, "host": "x.y"}), 403, "permission_error"),
    ]
    for response, status, kind in replies:
        assert response.status_code == status
        assert (response.json()["type"], response.json()["error"]["type"]) == ("error", kind)
    # Other routes keep OpenAI's.
    assert "type" not in client.post("/v1/completions", json={}).json()


def test_another_model_is_not_found(client: TestClient) -> None:
    response = client.post(PATH, json={**BODY, "model": "claude"})
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")


def test_errors_in_a_stream(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = Answer(text="He", finish_reason="error", error="broken")
    events = events_of(client.post(PATH, json={**BODY, "stream": True}).text)
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"


def test_a_waiting_stream_gets_pings(make_client: MakeClient, engine: FakeEngine) -> None:
    engine.answer = Answer(text="He", seconds=0.2)
    client = make_client(ping_seconds=0.01)
    events = events_of(client.post(PATH, json={**BODY, "stream": True}).text)
    assert [event["type"] for event in events].count("ping") > 2


def test_counting_takes_no_max_tokens() -> None:
    assert "max_tokens" not in CountTokensRequest.model_fields


def test_a_final_assistant_message_is_continued(client: TestClient, engine: FakeEngine) -> None:
    """Prefill."""
    begun = {"role": "assistant", "content": "I say"}
    assert client.post(PATH, json={**BODY, "messages": [*HI, begun]}).status_code == 200
    text = bytes(id for id in engine.asked[0].prompt if id < 256)
    assert text.endswith(b"I say")
    # Neither an end nor a new turn follows.
    assert engine.asked[0].prompt[-1] == ord("y")
