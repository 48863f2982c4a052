"""Fields of vLLM's and llama.cpp's servers, and CORS for --allowed-origin."""

import json
from importlib.metadata import version
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.serve.config import ServeConfig
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from tests.fakes import byte_backend, wrapped

from .conftest import MakeClient, assert_refused
from .fake_engine import NAME, FakeEngine, tiny
from .templates import tokenizer_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"model": NAME, "prompt": "Hi"},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def post(client: TestClient, path: str, **fields: Any) -> Any:
    response = client.post(path, json={**BODIES[path], **fields})
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("path", BODIES)
def test_fields_reach_the_engine(client: TestClient, engine: FakeEngine, path: str) -> None:
    limits = {"min_tokens": 2, "stop_token_ids": [7], "allowed_token_ids": [1, 2, 7]}
    post(client, path, **limits, top_k=-1, max_tokens=-1, temperature=0.5)
    params = engine.asked[-1].params
    assert (params.min_tokens, params.stop_token_ids) == (2, (7,))
    assert (params.allowed_token_ids, params.top_k, params.max_tokens) == ((1, 2, 7), 0, None)
    post(client, path, bad_words=["no", "never ever"])
    assert engine.asked[-1].params.bad_words == ("no", "never ever")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "field",
    [
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"guided_regex": "[0-9]+"},
        {"guided_choice": ["a", "b"]},
        {"guided_grammar": 'start: "a"'},
    ],
)
def test_guided_spellings(
    client: TestClient, engine: FakeEngine, path: str, field: dict[str, Any]
) -> None:
    post(client, path, **field)
    assert engine.asked[-1].grammar is not None
    (name,) = field
    change = {"structured_outputs": {"regex": "a"}, **field}
    response = client.post(path, json={**BODIES[path], **change})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "no schema"}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens"),
        ({"guided_regex": "a", "bad_words": ["x"]}, "bad_words"),
        ({"guided_regex": "a", "allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"bad_words": ["x"], "allowed_token_ids": [1]}, "bad_words"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"top_k": -2}, "top_k"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
    ],
)
def test_refusals(
    client: TestClient, engine: FakeEngine, path: str, change: dict[str, Any], param: str
) -> None:
    assert_refused(client, engine, path, {**BODIES[path], **change}, param)


@pytest.mark.parametrize("path", BODIES)
def test_token_ids(client: TestClient, engine: FakeEngine, path: str) -> None:
    whole = post(client, path, return_token_ids=True, n=2, temperature=1).json()
    prompt, ids = engine.asked[-1].prompt, list(b"Hello")
    assert [choice["token_ids"] for choice in whole["choices"]] == [ids, ids]
    holder = whole if path == CHAT else whole["choices"][1]
    assert holder["prompt_token_ids"] == prompt
    text = post(client, path, return_token_ids=True, stream=True).text
    chunks = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [id for choice in choices for id in choice.get("token_ids", ())] == ids
    holders = chunks if path == CHAT else choices
    assert [h["prompt_token_ids"] for h in holders if "prompt_token_ids" in h] == [prompt]
    assert "token_ids" not in post(client, path).text


def prefilled(engine: FakeEngine, client: TestClient, *messages: Any, **fields: Any) -> str:
    post(client, CHAT, messages=list(messages), continue_final_message=True, **fields)
    assert engine.asked[-1].begins_text is False
    return engine.model.tokenizer.decode(engine.asked[-1].prompt, skip_special_tokens=False)


@pytest.mark.parametrize("family", ["hermes", "chatml", "llama", "glm", "v3.1"])
@pytest.mark.parametrize("content", ["The answer", "x", "<|im_end|> is", "assistant"])
def test_the_final_message_is_continued(
    make_client: MakeClient, engine: FakeEngine, family: str, content: str
) -> None:
    engine.model = tiny(tokenizer_of(family), context=300)
    client = make_client()
    user = {"role": "user", "content": "Hi"}
    text = prefilled(engine, client, user, {"role": "assistant", "content": content})
    assert text.endswith(content) and "Hi" in text
    # Text never becomes a special token, also where it is continued.
    end = engine.model.tokenizer.encode("<|im_end|>", add_special_tokens=False)[0]
    assert engine.asked[-1].prompt[-len(content) :].count(end) == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({}, "continue_final_message"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "continue_final_message"),
        ({"messages": [{"role": "assistant", "content": "a"}], "add_generation_prompt": True},
         "add_generation_prompt"),
        ({"messages": [{"role": "assistant", "content": "a"}], "guided_regex": "a"},
         "continue_final_message"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued(
    client: TestClient, engine: FakeEngine, change: dict[str, Any], param: str
) -> None:
    body = {**BODIES[CHAT], "continue_final_message": True, **change}
    assert_refused(client, engine, CHAT, body, param)


def test_no_generation_prompt(make_client: MakeClient, engine: FakeEngine) -> None:
    engine.model = tiny(tokenizer_of("chatml"), context=300)
    post(make_client(), CHAT, add_generation_prompt=False)
    text = engine.model.tokenizer.decode(engine.asked[-1].prompt, skip_special_tokens=False)
    assert text.endswith("Hi<|im_end|>\n")


def fim_tokenizer() -> Tokenizer:
    return wrapped(byte_backend(["<s>", "</s>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"]))


def test_suffix(make_client: MakeClient, engine: FakeEngine) -> None:
    engine.model = tiny(fim_tokenizer())
    client = make_client()
    post(client, COMPLETIONS, prompt="ab", suffix="c<fim_middle>")
    assert engine.asked[-1].prompt == [258, *b"ab", 259, *b"c<fim_middle>", 260]
    body = {**BODIES[COMPLETIONS], "prompt": [1, 2], "suffix": "x"}
    response = client.post(COMPLETIONS, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "suffix")


def test_suffix_without_tokens_for_it(client: TestClient, engine: FakeEngine) -> None:
    assert_refused(client, engine, COMPLETIONS, {**BODIES[COMPLETIONS], "suffix": "x"}, "suffix")


def test_version(client: TestClient) -> None:
    assert client.get("/version").json() == {"version": version("lowlat")}


ORIGIN = "https://app.example.org"
KEY = "k" * 32


def test_an_allowed_origin(make_client: MakeClient) -> None:
    client = make_client(api_keys=(KEY,), allowed_origins=(ORIGIN,))
    headers = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    preflight = client.options(CHAT, headers=headers)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "x-stainless-lang" in preflight.headers["access-control-allow-headers"]
    allowed = {"Origin": ORIGIN, "Authorization": f"Bearer {KEY}"}
    for response, status in (
        (client.post(CHAT, json={**BODIES[CHAT], "user": "u"}, headers=allowed), 200),
        (client.post(CHAT, json={**BODIES[CHAT], "stream": True}, headers=allowed), 200),
        (client.post(CHAT, json={}, headers=allowed), 400),
        (client.get("/v1/models", headers={"Origin": ORIGIN}), 401),
    ):
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "x-lowlat-ignored" in response.headers["access-control-expose-headers"]
        assert response.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    "origin",
    [f"{ORIGIN}.evil.org", "http://app.example.org", f"{ORIGIN}:8443", "null", "*", ""],
)
def test_other_origins(make_client: MakeClient, origin: str) -> None:
    for options in ({"allowed_origins": (ORIGIN,)}, {}):
        client = make_client(**options)
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        for response in (
            client.options(CHAT, headers=headers),
            client.post(CHAT, json=BODIES[CHAT], headers={"Origin": origin}),
        ):
            assert response.status_code == 403
            assert not any(name.startswith("access-control") for name in response.headers)


def test_two_origins_are_none(make_client: MakeClient) -> None:
    client = make_client(allowed_origins=(ORIGIN,))
    headers = [("Origin", ORIGIN), ("Origin", ORIGIN)]
    assert client.post(CHAT, json=BODIES[CHAT], headers=headers).status_code == 403


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "example.org", "https://example.org/", "https://a b", "https://EXAMPLE.org",
     "file://x", "https://example.org\n", ""],
)  # fmt: skip
def test_origins_that_are_none(origin: str) -> None:
    with pytest.raises(UserError, match="allowed-origin"):
        ServeConfig(allowed_origins=(origin,))
