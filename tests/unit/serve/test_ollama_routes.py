"""Ollama's API: conversion to chats and completions, JSON lines, errors, descriptions."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.serve.chat.template_features import TemplateFeatures
from lowlat.serve.generation import Overloaded
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.hints import HEADER
from lowlat.serve.routes.ollama_request import OllamaChatRequest, chat_of
from tests.fakes import byte_backend, byte_tokenizer, wrapped

from .conftest import MakeClient
from .fake_engine import NAME, Answer, FakeEngine, tiny
from .templates import tokenizer_of

CHAT, GENERATE = "/api/chat", "/api/generate"
HI = [{"role": "user", "content": "Hi"}]
BODY: dict[str, Any] = {"model": NAME, "messages": HI, "stream": False}
PROMPT: dict[str, Any] = {"model": NAME, "prompt": "Hi", "stream": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def templated(engine: FakeEngine, make_client: MakeClient, family: str) -> TestClient:
    """A client of a model with the chat template of `family`."""
    engine.model = tiny(tokenizer_of(family), context=4096)
    return make_client()


def chat_fields(family: str = "hermes", **fields: Any) -> dict[str, Any]:
    request = OllamaChatRequest.model_validate({**BODY, **fields})
    chat = chat_of(TemplateFeatures.of(tokenizer_of(family)), request)
    return chat.model_dump(exclude_none=True, by_alias=True)


def test_a_whole_chat(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post(CHAT, json=BODY).json()
    assert answer["message"] == {"role": "assistant", "content": "Hello"}
    assert (answer["done"], answer["done_reason"]) == (True, "stop")
    assert answer["prompt_eval_count"] == len(engine.asked[0].prompt)
    assert (answer["eval_count"], answer["eval_duration"]) == (5, 500_000_000)
    params = engine.asked[0].params
    assert (params.temperature, params.top_k, params.top_p) == (0.8, 40, 0.9)


def test_chats_stream_unless_told_otherwise(client: TestClient) -> None:
    response = client.post(CHAT, json={"model": f"{NAME}:latest", "messages": HI})
    assert response.headers["content-type"] == "application/x-ndjson"
    *lines, last = lines_of(response.text)
    assert "".join(line["message"]["content"] for line in lines) == "Hello"
    assert not any(line["done"] for line in lines)
    assert last["done"] and last["message"]["content"] == ""
    assert last["eval_count"] == 5


def test_options_are_sampling_params(client: TestClient, engine: FakeEngine) -> None:
    options = {"num_predict": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125}
    options |= {"seed": 11, "stop": ["x"], "repeat_penalty": 1.5, "num_ctx": 8192}
    options |= {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    response = client.post(CHAT, json={**BODY, "options": options, "keep_alive": "5m"})
    assert response.headers[HEADER] == "keep_alive, options.num_ctx"
    params = engine.asked[0].params
    assert (params.max_tokens, params.temperature, params.top_k) == (7, 0.5, 3)
    assert (params.top_p, params.min_p, params.seed, params.stop) == (0.25, 0.125, 11, ("x",))
    assert (params.repetition_penalty, params.presence_penalty) == (1.5, 0.5)
    assert params.frequency_penalty == 0.25


@pytest.mark.parametrize("limit", [-1, -2, 100_000])
def test_the_context_bounds_num_predict(client: TestClient, engine: FakeEngine, limit: int) -> None:
    for path, body in ((CHAT, BODY), (GENERATE, {**PROMPT, "raw": True})):
        response = client.post(path, json={**body, "options": {"num_predict": limit}})
        assert response.status_code == 200
        asked = engine.asked[-1]
        most = engine.model.context - len(asked.prompt)
        assert asked.params.max_tokens in (None, most)


def test_thinking_and_tool_calls(engine: FakeEngine, make_client: MakeClient) -> None:
    client = templated(engine, make_client, "hermes")
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call>'
    engine.answer = Answer(text=f"<think>Well</think>\nSure{call}{call}")
    body = {**BODY, "tools": [TOOL], "think": True}
    response = client.post(CHAT, json=body)
    assert HEADER not in response.headers
    message = response.json()["message"]
    assert (message["thinking"], message["content"]) == ("Well", "Sure")
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [{"index": i, "name": "f", "arguments": {"a": 3}} for i in (0, 1)]
    lines = lines_of(client.post(CHAT, json={**body, "stream": True}).text)
    streamed = [c for line in lines for c in line["message"].get("tool_calls", [])]
    assert [call["function"] for call in streamed] == functions
    results = [{"role": "tool", "tool_name": "f", "content": "ok"}] * 2
    again = {**body, "messages": [*HI, message, *results]}
    assert client.post(CHAT, json=again).status_code == 200


def test_results_belong_to_calls_in_their_order() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g", "f")]
    turns = [{"role": "assistant", "tool_calls": calls}]
    turns += [{"role": "tool", "content": x, "tool_name": x[0]} for x in ("g1", "f1", "f2")]
    messages = chat_fields(messages=turns)["messages"]
    ids = [call["id"] for call in messages[0]["tool_calls"]]
    assert len(set(ids)) == 3
    assert [m["tool_call_id"] for m in messages[1:]] == [ids[1], ids[0], ids[2]]
    with pytest.raises(RequestError, match=r"messages\[4\]: no earlier"):
        chat_fields(messages=[*turns, {"role": "tool", "content": "f3"}])


@pytest.mark.parametrize(
    ("family", "think", "expected"),
    [
        ("hermes", True, {"enable_thinking": True}),
        ("hermes", False, {"enable_thinking": False}),
        ("llama", False, None),
    ],
)
def test_think(family: str, think: bool, expected: object) -> None:
    assert chat_fields(family, think=think).get("chat_template_kwargs") == expected


def test_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert chat_fields(format="json")["response_format"] == {"type": "json_object"}
    given = chat_fields(format=schema)["response_format"]["json_schema"]["schema"]
    assert given == schema
    assert "response_format" not in chat_fields(format="")


def test_prompts_go_through_the_template_unless_raw(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post(GENERATE, json={**PROMPT, "system": "Be kind"}).json()
    assert answer["response"] == "Hello"
    raw = client.post(GENERATE, json={**PROMPT, "raw": True}).json()
    assert raw["response"] == "Hello"
    chat, plain = (bytes(id for id in asked.prompt if id < 256) for asked in engine.asked)
    assert chat == b"<system>Be kindHi"
    assert plain == b"Hi" and len(engine.asked[1].prompt) == 2
    *lines, last = lines_of(client.post(GENERATE, json={"model": NAME, "prompt": "Hi"}).text)
    assert "".join(line["response"] for line in lines) == "Hello" and last["done"]


def test_a_model_without_a_template_continues_prompts(
    engine: FakeEngine, make_client: MakeClient
) -> None:
    engine.model = tiny(byte_tokenizer(None))
    client = make_client()
    assert client.post(GENERATE, json=PROMPT).json()["response"] == "Hello"
    assert engine.asked[0].prompt == list(b"Hi")
    response = client.post(GENERATE, json={**PROMPT, "system": "x"})
    assert "system: this model has no chat template" in response.json()["error"]


def test_nothing_to_answer_loads_the_model(client: TestClient, engine: FakeEngine) -> None:
    for path in (CHAT, GENERATE):
        answer = client.post(path, json={"model": NAME, "keep_alive": -1}).json()
        assert (answer["done"], answer["done_reason"]) == (True, "load")
    assert engine.asked == []


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_logprobs(client: TestClient, path: str) -> None:
    body = {**(BODY if path == CHAT else PROMPT), "logprobs": True, "top_logprobs": 2}
    entries = client.post(path, json=body).json()["logprobs"]
    assert [entry["token"] for entry in entries] == list("Hello")
    assert [top["logprob"] for top in entries[0]["top_logprobs"]] == [-0.5, -1.5]


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (GENERATE, {"template": "x"}, "template is not supported"),
        (GENERATE, {"suffix": "x"}, "suffix: this model has no fill-in-the-middle tokens"),
        (GENERATE, {"suffix": "x", "think": True}, "think cannot be combined with raw or suffix"),
        (GENERATE, {"context": [1]}, "context is not supported"),
        (GENERATE, {"raw": True, "system": "x"}, "system cannot be combined with raw"),
        (GENERATE, {"images": ["x"]}, "images"),
        (CHAT, {"options": {"mirostat": 1}}, "options.mirostat is not supported"),
        (CHAT, {"options": {"temperature": -1}}, "options.temperature"),
        (CHAT, {"think": True}, "think: this model does not reason"),
        (CHAT, {"tools": [TOOL]}, "tools: this model's chat template"),
        (CHAT, {"format": "xml"}, "format"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs requires logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 200}]}, "context length"),
    ],
)
def test_refusals_name_the_field(
    client: TestClient, path: str, change: dict[str, Any], message: str
) -> None:
    response = client.post(path, json={**(BODY if path == CHAT else PROMPT), **change})
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_failures_have_its_shape(client: TestClient, engine: FakeEngine) -> None:
    for verb in ("pull", "push", "create", "copy"):
        response = client.post(f"/api/{verb}", json={"model": NAME})
        assert response.status_code == 404
        assert f"cannot pull, push, {'create'}" in response.json()["error"]
    assert client.delete("/api/delete").status_code == 404
    assert client.get(CHAT).json()["error"] == "method not allowed for this path"
    missing = client.post(CHAT, json={**BODY, "model": "other"})
    assert missing.status_code == 404 and "does not exist" in missing.json()["error"]
    engine.refusal = Overloaded(7)
    assert client.post(CHAT, json=BODY).json()["error"] == "the server is busy; try again later"
    engine.refusal = None
    engine.answer = Answer(text="He", finish_reason="error", error="broken")
    last = lines_of(client.post(CHAT, json={**BODY, "stream": True}).text)[-1]
    assert last["error"] == "internal error; see the server's log"


def test_descriptions(engine: FakeEngine, make_client: MakeClient) -> None:
    client = templated(engine, make_client, "hermes")
    (entry,) = client.get("/api/tags").json()["models"]
    assert (entry["name"], entry["details"]["family"]) == (NAME, "llama")
    assert entry["size"] > 0 and len(entry["digest"]) == 64
    (running,) = client.get("/api/ps").json()["models"]
    assert running["context_length"] == engine.model.context
    shown = client.post("/api/show", json={"model": NAME}).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    assert shown["model_info"]["llama.context_length"] == engine.model.context
    assert "<tool_call>" in shown["template"]
    assert client.get("/api/version").json().keys() == {"version"}


def test_a_suffix_is_filled_in(engine: FakeEngine, make_client: MakeClient) -> None:
    marks = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    engine.model = tiny(wrapped(byte_backend(["<s>", "</s>", *marks])))
    answer = make_client().post(GENERATE, json={**PROMPT, "suffix": "!"}).json()
    assert answer["response"] == "Hello"
    assert engine.asked[0].prompt == [258, *b"Hi", 259, *b"!", 260]
