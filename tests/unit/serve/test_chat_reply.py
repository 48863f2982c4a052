"""Chat responses with reasoning and tool calls: complete and streamed responses agree."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from .fake_engine import NAME, Answer, FakeEngine, tiny
from .templates import tokenizer_of
from .test_chat_route import chunks_of

PATH = "/v1/chat/completions"
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look", "go")
]
BODY: dict[str, Any] = {
    "model": NAME,
    "messages": [{"role": "user", "content": "Hi"}],
    "tools": TOOLS,
}
LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'
GO = '<tool_call>\n{"name": "go", "arguments": {}}\n</tool_call>'


@pytest.fixture
def engine() -> FakeEngine:
    """Over a model whose template knows tools and reasoning."""
    return FakeEngine(model=tiny(tokenizer_of("hermes"), context=997))


def whole(client: TestClient, **changes: Any) -> dict[str, Any]:
    (choice,) = client.post(PATH, json={**BODY, **changes}).json()["choices"]
    return choice


def streamed(client: TestClient, **changes: Any) -> dict[str, Any]:
    """A stream put together as clients do."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": {}}
    reason = None
    for chunk in chunks_of(client.post(PATH, json={**BODY, **changes, "stream": True}).text):
        (choice,) = chunk["choices"]
        reason = choice["finish_reason"] or reason
        for name in ("content", "reasoning_content"):
            message[name] += choice["delta"].get(name, "")
        for part in choice["delta"].get("tool_calls", []):
            call = message["tool_calls"].setdefault(part["index"], {"arguments": ""})
            call.update({key: part[key] for key in ("id", "type") if key in part})
            call["name"] = part["function"].get("name", call.get("name"))
            call["arguments"] += part["function"].get("arguments", "")
    return {"message": message, "finish_reason": reason}


def test_the_model_is_described(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["supports_tools"] is True
    assert card["reasoning"] is True


def test_calls(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = Answer(text=f"Let me see.\n{LOOK}\n{GO}")
    choice = whole(client)
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"].strip() == "Let me see."
    names = [call["function"]["name"] for call in message["tool_calls"]]
    assert names == ["look", "go"]
    arguments = [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]]
    assert arguments == [{"at": "é"}, {}]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert {call["type"] for call in message["tool_calls"]} == {"function"}


def test_a_message_of_calls_alone_has_no_content(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = Answer(text=LOOK)
    assert whole(client)["message"]["content"] is None


def test_reasoning(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = Answer(text="<think>hm</think>Yes")
    message = whole(client)["message"]
    assert message["reasoning_content"].strip() == "hm"
    assert message["content"].strip() == "Yes"
    assert "tool_calls" not in message


@pytest.mark.parametrize(
    "text", [f"<think>hm</think>Well.\n{LOOK}\n{GO}", LOOK, "<think>hm</think>Yes", "Plain", ""]
)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_streams_say_the_same(
    client: TestClient, engine: FakeEngine, text: str, reason: Any
) -> None:
    engine.answer = Answer(text=text, finish_reason=reason)
    expected, found = whole(client), streamed(client)
    assert found["finish_reason"] == expected["finish_reason"]
    message = expected["message"]
    assert found["message"]["content"] == (message["content"] or "")
    assert found["message"]["reasoning_content"] == message.get("reasoning_content", "")
    calls = [call["function"] for call in message.get("tool_calls", [])]
    assert calls == [
        {"name": call["name"], "arguments": call["arguments"]}
        for call in found["message"]["tool_calls"].values()
    ]


def test_a_truncated_output_with_calls_has_finish_reason_length(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.answer = Answer(text=LOOK, finish_reason="length")
    assert whole(client)["finish_reason"] == "length"


def test_logprobs_go_with_the_text(client: TestClient, engine: FakeEngine) -> None:
    """Every token's log-probability is returned once, also for tokens without text."""
    engine.answer = Answer(text=f"<think>hm</think>Well {LOOK}")
    body = {**BODY, "logprobs": True, "stream": True}
    chunks = chunks_of(client.post(PATH, json=body).text)
    data = [
        entry["bytes"]
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert bytes(byte for entry in data for byte in entry).decode() == engine.answer.text


def test_a_template_error_fails_only_its_request(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowlat.serve.routes import chat as routes_chat

    def fail(*args: Any) -> Any:
        raise RecursionError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(routes_chat, "prepare_chat", fail)
        response = client.post(PATH, json=BODY)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert client.post(PATH, json=BODY).status_code == 200
