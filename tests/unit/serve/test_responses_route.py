"""POST /v1/responses: conversion to chats, output items, events."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.generate.completion import CompletionDelta
from lowlat.serve.chat.output_parser import OutputParser, ReasoningMode, ReasoningTags
from lowlat.serve.protocol.messages import AssistantMessage
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.reply import respond
from lowlat.serve.routes.responses import ResponseObject, ResponsesReply
from lowlat.serve.routes.responses_output import Output
from lowlat.serve.routes.responses_request import ResponsesRequest, as_chat
from lowlat.serve.tool_parsers.state import (
    ContentPart,
    ReasoningPart,
    ToolCallArguments,
    ToolCallStart,
)

from .conftest import assert_refused
from .fake_engine import NAME, Answer, FakeEngine

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": NAME, "input": "Hi"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}


def events_of(text: str) -> list[dict[str, Any]]:
    """Data of the events of a stream; each carries its type twice and its number."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_complete_response(client: TestClient, engine: FakeEngine) -> None:
    body = {**BODY, "instructions": "Be kind", "max_output_tokens": 9, "temperature": 0.5}
    answer = client.post(PATH, json=body).json()
    ResponseObject.model_validate(answer)
    assert answer["status"] == "completed"
    (item,) = answer["output"]
    assert item["type"] == "message"
    assert item["content"] == [
        {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    ]
    assert (answer["instructions"], answer["temperature"]) == ("Be kind", 0.5)
    assert answer["usage"]["output_tokens"] == 5
    params = engine.asked[0].params
    assert (params.max_tokens, params.temperature) == (9, 0.5)
    assert b"Be kind" in bytes(id for id in engine.asked[0].prompt if id < 256)


class ScriptedContext(RequestContext):
    """A context whose steps each yield a text and a number of tokens."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        self._steps = steps
        self._generations = []
        self.num_tokens = 0

    async def deltas(self) -> AsyncGenerator[tuple[int, CompletionDelta], None]:
        for number, (text, count) in enumerate(self._steps, 1):
            reason = "stop" if number == len(self._steps) else None
            yield (
                0,
                CompletionDelta(
                    index=0,
                    text=text,
                    tokens=(7,) * count,
                    logprobs=(),
                    finish_reason=reason,
                    error=None,
                ),
            )


@pytest.mark.parametrize(
    ("steps", "thinking", "count"),
    [
        (
            [(p, 1) for p in ("<think>", "\n", "a", "\n\n", "b", "</think>", "\n\n", "c")],
            "maybe",
            6,
        ),
        ([(p, 1) for p in ("\n", "a", "\n", "</think>", "c", "d")], "begun", 4),
        ([("<think>a b c</think>x", 6), ("y", 1)], "maybe", 6),
        ([("<think>a", 2), ("", 1), ("b</think>", 2), ("x", 1)], "maybe", 5),
        ([("a", 1), ("<think>b</think>", 3)], "maybe", 0),
        ([("a", 1)], "never", 0),
    ],
)
def test_tokens_of_reasoning(
    steps: list[tuple[str, int]], thinking: ReasoningMode, count: int
) -> None:
    """Marks and line ends that are held back are counted with it."""
    parser = OutputParser(marks=ReasoningTags("<think>", "</think>"), thinking=thinking)
    request = ResponsesRequest.model_validate(BODY)
    context = ScriptedContext(steps)
    reply = ResponsesReply(context, request, parser, {})
    response = asyncio.run(respond(context, reply, stream=False))
    answer = ResponseObject.model_validate_json(bytes(response.body))
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == count


def test_events(client: TestClient) -> None:
    events = events_of(client.post(PATH, json={**BODY, "stream": True}).text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 5,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    last = events[-1]["response"]
    assert last["output"] == [events[-2]["item"]]
    assert last["usage"]["total_tokens"] == last["usage"]["input_tokens"] + 5


def test_a_truncated_response_is_incomplete(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = Answer(finish_reason="length")
    answer = client.post(PATH, json=BODY).json()
    assert answer["status"] == answer["output"][0]["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events_of(client.post(PATH, json={**BODY, "stream": True}).text)[-1]["type"] == (
        "response.incomplete"
    )


def test_an_error_is_reported(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = Answer(finish_reason="error", error="secret")
    assert client.post(PATH, json=BODY).status_code == 500
    text = client.post(PATH, json={**BODY, "stream": True}).text
    last = events_of(text)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "internal_error"
    assert "secret" not in text


def test_items_of_all_kinds() -> None:
    output = Output({})
    parts = [
        ReasoningPart("hm"),
        ReasoningPart("m"),
        ContentPart("Let me "),
        ContentPart("see"),
        ToolCallStart(0, "call_1", "f"),
        ToolCallArguments(0, '{"a":'),
        ToolCallArguments(0, "1}"),
        ToolCallStart(1, "call_2", "g"),
        ToolCallArguments(1, "{}"),
    ]
    events = [event for part in parts for event in output.push(part)]
    events += output.close()
    kinds = [item.type for item in output.items]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert {item.status for item in output.items} == {"completed"}
    dumped = [item.model_dump() for item in output.items]
    assert dumped[0]["content"] == [{"type": "reasoning_text", "text": "hmm"}]
    assert dumped[1]["content"][0]["text"] == "Let me see"
    assert (dumped[2]["call_id"], dumped[2]["arguments"]) == ("call_1", '{"a":1}')
    done = [fields["item"] for kind, fields in events if kind == "response.output_item.done"]
    assert done == dumped
    added = [f["output_index"] for kind, f in events if kind == "response.output_item.added"]
    assert added == [0, 1, 2, 3]
    deltas = [f["delta"] for kind, f in events if kind.endswith("arguments.delta")]
    assert deltas == ['{"a":', "1}", "{}"]


def test_items_become_messages() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"role": "developer", "content": "d"},
        {"role": "assistant", "content": "e"},
        {"role": "assistant", "content": "f"},
    ]
    request = ResponsesRequest.model_validate({**BODY, "input": items, "instructions": "i"})
    messages = as_chat(request)[0].messages
    roles = [message.role for message in messages]
    assert roles == [
        "system",
        "user",
        "assistant",
        "tool",
        "developer",
        "assistant",
        "assistant",
    ]
    joined = messages[2]
    assert isinstance(joined, AssistantMessage)
    assert (joined.content, joined.reasoning_content) == ("b", "r")
    assert [call.id for call in joined.tool_calls or []] == ["c1", "c2"]


def test_tools_and_formats_are_converted() -> None:
    text = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}
    choice = {"type": "function", "name": "f"}
    body = {**BODY, "tools": [TOOL], "tool_choice": choice, "text": text}
    chat = as_chat(ResponsesRequest.model_validate(body))[0].model_dump(by_alias=True)
    assert chat["tools"][0]["function"]["name"] == "f"
    assert chat["tools"][0]["function"]["strict"] is True
    assert chat["tool_choice"]["function"]["name"] == "f"
    assert chat["response_format"]["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    "change",
    [
        {"store": False, "background": False, "truncation": "disabled", "include": []},
        {"text": {"format": {"type": "text"}}, "metadata": {"a": "b"}, "user": "u"},
    ],
)
def test_harmless_fields_are_accepted(client: TestClient, change: dict[str, Any]) -> None:
    assert client.post(PATH, json={**BODY, **change}).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "u"}]}]},
            "input[0].content[0].type",
        ),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"messages": []}, "messages"),
    ],
)
def test_refusals_name_the_field(
    client: TestClient, engine: FakeEngine, change: dict[str, Any], param: str
) -> None:
    assert_refused(client, engine, PATH, {**BODY, **change}, param)
