"""POST /v1/chat/completions over the fake engine."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.serve.routes.chat import ChatCompletion, ChatCompletionChunk

from .fake_engine import NAME, Answer, FakeEngine

PATH = "/v1/chat/completions"
HELLO = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}


def chunks_of(text: str) -> list[dict[str, Any]]:
    """Data of a stream's events; it must end with [DONE]."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def test_complete_response(client: TestClient, engine: FakeEngine) -> None:
    response = client.post(PATH, json=HELLO)
    assert response.status_code == 200
    answer = response.json()
    ChatCompletion.model_validate(answer)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == NAME
    (choice,) = answer["choices"]
    message = {"role": "assistant", "content": "Hello", "refusal": None}
    assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = answer["usage"]
    prompt = len(engine.asked[0].prompt)
    assert usage["prompt_tokens"] == prompt
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == prompt + 5
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}


def test_stream(client: TestClient) -> None:
    response = client.post(PATH, json={**HELLO, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(response.text)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello"
    assert deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert not any("usage" in chunk for chunk in chunks)


def test_stream_with_usage(client: TestClient) -> None:
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    last = chunks_of(client.post(PATH, json=body).text)[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert set(last["lowlat"]) == {"prefill_seconds", "decode_seconds", "tokens_per_second"}


def test_several_choices(client: TestClient) -> None:
    whole = client.post(PATH, json={**HELLO, "n": 3}).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["Hello"] * 3
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks_of(client.post(PATH, json={**HELLO, "n": 3, "stream": True}).text):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "Hello", 1: "Hello", 2: "Hello"}


def test_logprobs(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = Answer(text="é")
    body = {**HELLO, "logprobs": True, "top_logprobs": 2}
    (choice,) = client.post(PATH, json=body).json()["choices"]
    first, second = choice["logprobs"]["content"]
    assert (first["bytes"], second["bytes"]) == ([0xC3], [0xA9])
    assert first["token"] == "\ufffd"
    assert first["logprob"] == -0.5
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.5]
    chunks = chunks_of(client.post(PATH, json={**body, "stream": True}).text)
    entries = [
        entry
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert entries == [first, second]


def test_defaults_are_those_of_openai(client: TestClient, engine: FakeEngine) -> None:
    client.post(PATH, json=HELLO)
    params = engine.asked[0].params
    assert (params.temperature, params.top_p, params.n) == (1.0, 1.0, 1)
    assert params.max_tokens is None
    assert params.logprobs is None


def test_options_reach_the_engine(client: TestClient, engine: FakeEngine) -> None:
    options = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {"65": -100},
        "seed": 7,
        "stop": ["a", "b"],
        "max_completion_tokens": 9,
        "ignore_eos": True,
    }
    body = {**HELLO, **options, "priority": -3, "deadline_seconds": 2.5}
    assert client.post(PATH, json=body).status_code == 200
    asked = engine.asked[0]
    assert asked.priority == -3
    assert asked.deadline is not None and 1.0 < asked.deadline < 2.5  # what is left of it
    params = asked.params
    assert params.logit_bias == {65: -100.0}
    assert params.stop == ("a", "b")
    assert params.max_tokens == 9
    assert params.ignore_eos
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"):
        assert getattr(params, name) == options[name]


def test_greedy_ignores_filters_and_takes_n(client: TestClient, engine: FakeEngine) -> None:
    """Regression: a 400 for what clients of OpenAI's API send with temperature 0."""
    body = {**HELLO, "temperature": 0, "top_p": 0.9, "top_k": 50, "min_p": 0.1}
    assert client.post(PATH, json=body).status_code == 200
    assert engine.asked[0].params.is_greedy
    assert client.post(PATH, json={**body, "n": 2}).status_code == 200
    params = engine.asked[1].params
    assert (params.n, params.temperature, params.top_k, params.top_p) == (2, 1.0, 1, 1.0)


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (Answer(finish_reason="deadline"), 408, "deadline_exceeded"),
        (Answer(finish_reason="abort"), 503, "shutting_down"),
        (Answer(finish_reason="error", error="boom in layer 3"), 500, "internal_error"),
    ],
)
def test_finish_reasons_that_are_errors(
    client: TestClient, engine: FakeEngine, answer: Answer, status: int, code: str
) -> None:
    engine.answer = answer
    response = client.post(PATH, json=HELLO)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "boom" not in response.text
    streamed = client.post(PATH, json={**HELLO, "stream": True}).text
    last = streamed.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    # The client must not ask again for what will be late again.
    assert response.headers.get("x-should-retry") == ("false" if status == 408 else None)
    assert "[DONE]" not in streamed
    assert "boom" not in streamed


def test_finish_reason_length(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = Answer(finish_reason="length")
    (choice,) = client.post(PATH, json=HELLO).json()["choices"]
    assert choice["finish_reason"] == "length"


def test_another_model_is_not_found(client: TestClient) -> None:
    response = client.post(PATH, json={**HELLO, "model": "gpt-4"})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_every_generation_is_given_up_at_the_end(client: TestClient, engine: FakeEngine) -> None:
    client.post(PATH, json=HELLO)
    client.post(PATH, json={**HELLO, "stream": True})
    assert [generation.is_cancelled for generation in engine.generations] == [True, True]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1, "n": 65}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x" * 257]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias.05"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"seed": 1 << 63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "age": 3}]}, "messages[0].age"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        ({"priority": 101}, "priority"),
        ({"priority": -101}, "priority"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"min_tokens": -3}, "min_tokens"),
    ],
)
def test_refusals_name_the_field(
    client: TestClient, engine: FakeEngine, change: dict[str, Any], param: str
) -> None:
    response = client.post(PATH, json={**HELLO, **change})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert engine.asked == []


@pytest.mark.parametrize("field", ["model", "messages"])
def test_missing_fields_are_named(client: TestClient, field: str) -> None:
    body = {name: value for name, value in HELLO.items() if name != field}
    error = client.post(PATH, json=body).json()["error"]
    assert (error["param"], error["message"]) == (field, f"{field} is missing")


@pytest.mark.parametrize(
    "change",
    [
        {"modalities": ["text"]},
        {"temperature": None, "stop": None, "n": None, "tools": None, "stream_options": None},
        {"response_format": {"type": "text"}},
        {"stop": []},
        {"logit_bias": {}},
        {"tool_choice": "none"},
    ],
)
def test_harmless_fields_are_accepted(client: TestClient, change: dict[str, Any]) -> None:
    assert client.post(PATH, json={**HELLO, **change}).status_code == 200


def test_a_response_message_is_valid_input(client: TestClient, engine: FakeEngine) -> None:
    """Regression: refusing the nulls that clients copy from an answer into the next request."""
    message = client.post(PATH, json=HELLO).json()["choices"][0]["message"]
    extra = {"audio": None, "function_call": None, "annotations": [], "tool_calls": None}
    messages = [*HELLO["messages"], {**message, **extra}, {"role": "user", "content": "More"}]
    assert client.post(PATH, json={**HELLO, "messages": messages}).status_code == 200
    assert len(engine.asked[1].prompt) > len(engine.asked[0].prompt)
