"""Grammars that exceed their limits during generation: an error that names the client's field."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.generate import grammar as grammar_module
from lowlat.generate.completion import CompletionDelta
from lowlat.generate.grammar import GrammarCompiler
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.generate.structured import Grammar
from lowlat.serve.async_engine import AsyncEngine
from tests.fakes import ScriptedModel, byte_tokenizer, gqa_config

from .engine_use import assert_nothing_is_left, with_engine
from .fake_engine import NAME, Answer, FakeEngine

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
USER = {"messages": [{"role": "user", "content": "Hi"}]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "structured_outputs": (
        "/v1/completions",
        {"prompt": "Hi", "structured_outputs": {"regex": "a+"}},
    ),
    "response_format": ("/v1/chat/completions", {**USER, "response_format": RESPONSE_FORMAT}),
    "text.format": (
        "/v1/responses",
        {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
    ),
}


@pytest.fixture
def told(engine: FakeEngine) -> str:
    """What the engine's answers end with."""
    message = "grammar: its masks take too long; simplify or correct it"
    engine.answer = Answer(text="", finish_reason="error", error=message, is_grammar_error=True)
    return message


@pytest.mark.parametrize("field", CASES)
def test_complete_responses_name_the_field(client: TestClient, told: str, field: str) -> None:
    path, body = CASES[field]
    answer = client.post(path, json={"model": NAME, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert error["type"] == "invalid_request_error" and error["message"] == f"{field}: {told}"


@pytest.mark.parametrize("field", CASES)
def test_streams_end_with_the_error(client: TestClient, told: str, field: str) -> None:
    path, body = CASES[field]
    text = client.post(path, json={"model": NAME, **body, "stream": True}).text
    last = json.loads(text.strip().split("\n\n")[-1].split("data: ")[1])
    if path == "/v1/responses":
        assert last["type"] == "response.failed"
        error = last["response"]["error"]
        assert error == {"code": "invalid_prompt", "message": f"{field}: {told}"}
    else:
        assert (last["error"]["param"], last["error"]["message"]) == (field, f"{field}: {told}")
        assert "[DONE]" not in text


def test_a_grammar_limit_reached_later_names_the_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: status 500 for a grammar that grows with the answer."""
    monkeypatch.setattr(grammar_module, "MASK_SECONDS", 0.1)
    monkeypatch.setattr(grammar_module, "MASK_SECONDS_PER_TOKEN", 0.0)
    config = gqa_config(max_position_embeddings=4096)
    model = Model(ScriptedModel(config, lambda _: ord("x")), byte_tokenizer(), name="x")
    compiler = GrammarCompiler(model.tokenizer, vocab_size=config.vocab_size)
    grammar = compiler.compile(Grammar(lark='start: s\ns: s s | "x"'))

    async def use(engine: AsyncEngine) -> None:
        generation = await engine.submit(b"x", SamplingParams(max_tokens=1200), grammar=grammar)
        deltas: list[CompletionDelta] = [delta async for delta in generation]
        assert deltas[-1].finish_reason == "error" and deltas[-1].is_grammar_error
        assert (deltas[-1].error or "").startswith("grammar: ")
        assert len(deltas) > 10

    assert_nothing_is_left(with_engine(use, model))
