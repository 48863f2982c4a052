"""Requests beyond the context: OpenAI's wording on all routes; litellm and LangChain know it."""

import sys
from typing import Any

import httpx
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI

from tests import forked
from tests.abuse.local import listening

from .conftest import KEY, Server
from .test_embeddings import embedding_model
from .tiny_server import CONTEXT, NAME

LONG = "x" * (CONTEXT + 1)
WORDS = "This model's maximum context length is {} tokens. "


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", chat(LONG), "messages"),
        ("/v1/chat/completions", chat(LONG * 2000), "messages"),
        ("/v1/chat/completions", {**chat("x"), "max_tokens": CONTEXT}, "max_tokens"),
        (
            "/v1/chat/completions",
            {**chat("x"), "max_completion_tokens": CONTEXT},
            "max_completion_tokens",
        ),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": LONG * 2000}, "prompt"),
        ("/v1/completions", {"prompt": [[1] * CONTEXT, [1]]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "max_tokens": CONTEXT}, "max_tokens"),
        ("/v1/responses", {"input": LONG}, "input"),
        ("/v1/responses", {"input": LONG, "truncation": "auto"}, "input"),
        ("/v1/responses", {"input": "x", "max_output_tokens": CONTEXT}, "max_output_tokens"),
        ("/v1/messages", {**chat(LONG), "max_tokens": 1}, "messages"),
        ("/api/chat", chat(LONG), "messages"),
        ("/api/generate", {"prompt": LONG}, "prompt"),
        ("/tokenize", {"prompt": LONG * 2000}, "prompt"),
        ("/detokenize", {"tokens": [1] * (CONTEXT + 1)}, "tokens"),
    ],
)
def test_every_route(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(
        f"{server.url}{path}", json={"model": NAME, **body}, headers=headers, timeout=60.0
    )
    check_overflow(response, CONTEXT, param)


def check_overflow(response: httpx.Response, context: int, param: str) -> None:
    error = response.json()["error"]
    if isinstance(error, str):  # Ollama's format
        error = {**response.json(), "message": error}
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith(WORDS.format(context)) and "\n" not in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed"])
def test_embeddings(path: str) -> None:
    model = embedding_model()
    with listening(model) as server:
        for given in (["x", "y" * (model.context + 1)], "z" * 4_000_000):
            body = {"model": model.name, "input": given}
            url = f"http://127.0.0.1:{server.port}{path}"
            check_overflow(httpx.post(url, json=body, timeout=60.0), model.context, "input")


def test_detokenize_takes_a_whole_context(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": NAME, "tokens": [97] * CONTEXT}
    response = httpx.post(f"{server.url}/detokenize", json=body, headers=headers, timeout=60.0)
    assert response.json() == {"prompt": "a" * CONTEXT}


@pytest.mark.parametrize("options", [{}, {"max_tokens": CONTEXT}], ids=["prompt", "max_tokens"])
def test_langchain(server: Server, options: dict[str, int]) -> None:
    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key=KEY, model=NAME, max_retries=0)
    with pytest.raises(ContextOverflowError):
        model.invoke("x" if options else LONG, **options)


LITELLM = f"""
import sys, litellm
for text, most in (({LONG!r}, 1), ("x", {CONTEXT})):
    try:
        litellm.completion(
            model="openai/" + sys.argv[1], api_base=sys.argv[2], api_key=sys.argv[3], num_retries=0,
            messages=[{{"role": "user", "content": text}}], max_tokens=most,
        )
    except litellm.ContextWindowExceededError:
        print("recognized")
"""
"""A prompt that is too long, and an output."""


@pytest.mark.slow
def test_litellm(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: litellm leaves event loops and sockets open."""
    monkeypatch.setenv(
        "LITELLM_LOCAL_MODEL_COST_MAP", "True"
    )  # else it asks the network for prices
    command = [sys.executable, "-c", LITELLM, NAME, f"{server.url}/v1", KEY]
    done = forked.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines().count("recognized") == 2, done.stderr[-2000:]


def test_an_unknown_model_is_named_in_one_line(server: Server) -> None:
    """Regression: control characters of the request in the error, and so in terminals and logs."""
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "a\n\x1b[31m\x7fb", "prompt": "x"}
    response = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60.0)
    message = response.json()["error"]["message"]
    assert response.status_code == 404 and message.isprintable() and "'a??[31m?b'" in message
