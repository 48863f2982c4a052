"""Hints without effect are accepted and named in a response header; what they name stays true."""

from typing import Annotated, Any

import pytest
from starlette.testclient import TestClient

from lowlat.serve.chat.template_features import TemplateFeatures
from lowlat.serve.protocol.base import StrictModel
from lowlat.serve.protocol.hints import HEADER, Hint, Ignored, ignored_fields

from .conftest import MakeClient
from .fake_engine import NAME, FakeEngine, tiny
from .templates import tokenizer_of, tokenizer_with

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PART = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"model": NAME, "prompt": "Hi"},
    RESPONSES: {"model": NAME, "input": "Hi"},
}
EARLIER = {"role": "assistant", "content": "x", "tool_calls": []}
STREAMED = {"stream": True, "stream_options": {"include_obfuscation": False}}
SHARED: list[tuple[dict[str, Any], str]] = [
    ({"user": "u", "metadata": {"a": "b"}}, "metadata, user"),
    ({"safety_identifier": "s", "service_tier": "flex"}, "safety_identifier, service_tier"),
    ({"store": True, "verbosity": "low"}, "store, verbosity"),
    ({"prompt_cache_key": "k", "prompt_cache_retention": "24h"}, "prompt_cache_key, "
     "prompt_cache_retention"),
    ({"client_metadata": {"a": {"b": 1}}}, "client_metadata"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    ({"request_id": "r"}, "request_id"),
    ({"cache_prompt": False, "id_slot": -1}, "cache_prompt, id_slot"),
]  # fmt: skip
"""Of chats and completions."""
CASES: list[tuple[str, dict[str, Any], str]] = [
    *((path, change, named) for path in (CHAT, COMPLETIONS) for change, named in SHARED),
    (CHAT, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
     "parallel_tool_calls, tool_choice, tools"),
    (CHAT, {"messages": [{"role": "user", "content": [PART, PART]}]},
     "messages.content.cache_control"),
    (CHAT, {"messages": [EARLIER, {"role": "user", "content": "x"}]}, "messages.tool_calls"),
    (CHAT, STREAMED, "stream_options.include_obfuscation"),
    (COMPLETIONS, {"user": "u", **STREAMED}, "stream_options.include_obfuscation, user"),
    (RESPONSES, {"reasoning": {"summary": "auto"}, "text": {"verbosity": "high"}},
     "reasoning.summary, text.verbosity"),
    (RESPONSES, {"include": ["reasoning.encrypted_content"], "truncation": "auto"},
     "include, truncation"),
    (RESPONSES, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, **STREAMED},
     "parallel_tool_calls, stream_options.include_obfuscation, tool_choice, tools"),
    (RESPONSES, {"prompt_cache_key": "k", "client_metadata": {}}, "client_metadata, "
     "prompt_cache_key"),
    (RESPONSES, {"max_tool_calls": 3, "safety_identifier": "s"},
     "max_tool_calls, safety_identifier"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "change", "named"), CASES)
def test_hints_are_accepted_and_named(
    client: TestClient, engine: FakeEngine, path: str, change: dict[str, Any], named: str
) -> None:
    response = client.post(path, json={**BODIES[path], **change})
    assert response.status_code == 200, response.text
    assert response.headers[HEADER] == named
    assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (CHAT, {"store": False, "user": None, "metadata": None, "tools": None, "stop": []}),
        (COMPLETIONS, {"store": False, "user": None, "cache_prompt": None}),
        (RESPONSES, {"truncation": "disabled", "include": [], "metadata": {"a": "b"}}),
    ],
)
def test_fields_that_are_heeded_or_null_are_not_named(
    client: TestClient, path: str, change: dict[str, Any]
) -> None:
    response = client.post(path, json={**BODIES[path], **change})
    assert response.status_code == 200
    assert HEADER not in response.headers


def test_a_hint_is_still_checked(client: TestClient) -> None:
    for change in ({"verbosity": 3}, {"metadata": {"a": 1}}, {"reasoning_effort": "huge"}):
        response = client.post(CHAT, json={**BODIES[CHAT], **change})
        (name,) = change
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith(name)


def _prompt(family: str, make_client: MakeClient, engine: FakeEngine, **fields: Any) -> Any:
    engine.model = tiny(tokenizer_of(family), context=300)
    response = make_client().post(CHAT, json={**BODIES[CHAT], **fields})
    assert response.status_code == 200, response.text
    text = engine.model.tokenizer.decode(engine.asked[-1].prompt, skip_special_tokens=False)
    return text, response.headers.get(HEADER)


@pytest.mark.parametrize("family", ["hermes", "v3.1", "glm"])
def test_effort_is_the_templates_switch(
    make_client: MakeClient, engine: FakeEngine, family: str
) -> None:
    switch = "thinking" if family == "v3.1" else "enable_thinking"
    seen = {}
    for thinks, efforts in ((False, ("none", "minimal")), (True, ("low", "high", "xhigh"))):
        kwargs = {"chat_template_kwargs": {switch: thinks}}
        expected = _prompt(family, make_client, engine, **kwargs)
        for effort in efforts:
            assert _prompt(family, make_client, engine, reasoning_effort=effort) == expected
        seen[thinks] = expected
    assert seen[True] != seen[False]
    # What a request sets explicitly wins, and then the effort has no effect.
    kwargs = {"chat_template_kwargs": {switch: True}, "reasoning_effort": "none"}
    assert _prompt(family, make_client, engine, **kwargs) == (seen[True][0], "reasoning_effort")


def test_effort_without_a_switch_is_named(make_client: MakeClient, engine: FakeEngine) -> None:
    text, named = _prompt("chatml", make_client, engine, reasoning_effort="high")
    assert (text, named) == (_prompt("chatml", make_client, engine)[0], "reasoning_effort")


def test_effort_of_a_template_with_levels() -> None:
    leveled = TemplateFeatures.of(
        tokenizer_with("{{ reasoning_effort }}{% for m in messages %}{{ m.content }}{% endfor %}")
    )
    efforts = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
    levels = [leveled.effort_variables(effort)["reasoning_effort"] for effort in efforts]
    assert levels == ["low", "low", "low", "medium", "high", "high", "high"]
    assert leveled.effort_variables(None) == {}


def test_effort_of_responses(make_client: MakeClient, engine: FakeEngine) -> None:
    engine.model = tiny(tokenizer_of("hermes"), context=300)
    body = {**BODIES[RESPONSES], "reasoning": {"effort": "none", "summary": "auto"}}
    response = make_client().post(RESPONSES, json=body)
    assert response.headers[HEADER] == "reasoning.summary"
    text = engine.model.tokenizer.decode(engine.asked[-1].prompt, skip_special_tokens=False)
    assert text.endswith("<think>\n\n</think>\n\n")


def test_the_document_marks_hints(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["ChatRequest"]["properties"]
    assert fields["verbosity"][HEADER] is True
    assert HEADER not in fields["reasoning_effort"] and HEADER not in fields["temperature"]


class Leaf(StrictModel):
    a: Hint[int | None] = None


class Tree(StrictModel):
    leaves: list[Leaf] | None = None
    leaf: Annotated[Leaf | None, "a comment"] = None
    b: Annotated[int | None, Ignored(when=lambda tree: tree.leaf is None)] = None


def test_paths_of_hints() -> None:
    tree = Tree(leaves=[Leaf(), Leaf(a=1), Leaf(a=2)], b=1)
    assert ignored_fields(tree) == {"leaves.a", "b"}
    assert ignored_fields(Tree(leaf=Leaf(a=0), b=1)) == {"leaf.a"}
    assert ignored_fields(Tree(leaf=Leaf(a=None))) == set()
