"""The official `ollama` client, unmodified, against a server of random weights.

The output of random weights means nothing; the test checks its format.
"""

import contextlib
import json
from collections.abc import Iterator

import ollama
import pytest

from .conftest import KEY, Server
from .tiny_server import CONTEXT, NAME

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0, "num_predict": 12}


def get_weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: its name
    """
    return f"Rain in {city}"


@pytest.fixture
def client(server: Server) -> Iterator[ollama.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with contextlib.closing(ollama.Client(host=server.url, headers=headers)) as made:
        yield made


def test_models(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == [NAME]
    assert [model.model for model in client.ps().models] == [NAME]
    shown = client.show(NAME)
    assert shown.modelinfo is not None and shown.modelinfo["llama.context_length"] == CONTEXT
    assert "tools" in (shown.capabilities or [])


def test_a_stream_says_what_the_whole_answer_says(client: ollama.Client) -> None:
    whole = client.chat(NAME, HELLO, options=GREEDY)
    assert whole.done and 0 < (whole.eval_count or 0) <= 12
    pieces = list(client.chat(NAME, HELLO, options=GREEDY, stream=True, keep_alive="5m"))
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].done and pieces[-1].eval_count == whole.eval_count


def test_generate(client: ollama.Client) -> None:
    answer = client.generate(NAME, "Hello", options=GREEDY, logprobs=True, top_logprobs=2)
    assert answer.done and answer.logprobs
    raw = client.generate(NAME, "Hello", raw=True, options=GREEDY)
    assert (raw.prompt_eval_count or 0) < (answer.prompt_eval_count or 0)


def test_formats(client: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    answer = client.chat(NAME, HELLO, format=schema, think=False, options={"seed": 1})
    assert json.loads(answer.message.content or "")["kind"] in ("a", "b")


def test_tools_are_offered(client: ollama.Client) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    history = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "get_weather", "content": get_weather("Oslo")},
    ]
    plain = client.chat(NAME, history, options=GREEDY)
    offered = client.chat(NAME, history, tools=[get_weather], options=GREEDY)
    assert (offered.prompt_eval_count or 0) > (plain.prompt_eval_count or 0)


def test_errors(client: ollama.Client, server: Server) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist") as missing:
        client.chat("other", HELLO)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="cannot pull"):
        client.pull("other")
    with pytest.raises(ollama.ResponseError, match="context length"):
        list(client.generate(NAME, "x" * 2 * CONTEXT, stream=True))
    with pytest.raises(ollama.ResponseError, match="API key"):
        with contextlib.closing(ollama.Client(host=server.url)) as stranger:
            stranger.list()
