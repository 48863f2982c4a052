"""litellm, unmodified: its OpenAI-compatible provider."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import KEY, Server
from .test_openai_client import HELLO, JSON_TOKENS, NO_THOUGHTS, WEATHER
from .tiny_server import NAME

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture
def options(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    # Otherwise it fetches prices of models from the network.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    # Otherwise it makes an event loop that nothing closes.
    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())
        yield {
            "model": f"openai/{NAME}",
            "api_base": f"{server.url}/v1",
            "api_key": KEY,
            "max_tokens": JSON_TOKENS,
            "seed": 1,
            "num_retries": 0,
            "extra_body": NO_THOUGHTS,
        }
        asyncio.set_event_loop(None)


def test_chat_and_stream(options: dict[str, Any]) -> None:
    import litellm

    answer = litellm.completion(messages=HELLO, **options)
    chunks = litellm.completion(messages=HELLO, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert answer.usage.completion_tokens <= JSON_TOKENS


def test_tools(options: dict[str, Any]) -> None:
    import litellm

    tools = {"tools": [WEATHER], "parallel_tool_calls": False}
    answer = litellm.completion(messages=HELLO, tool_choice="required", **tools, **options)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain"}
    messages = [*HELLO, message.model_dump(), result]
    assert litellm.completion(messages=messages, **tools, **options).choices


def test_marks_of_prompts_to_cache(options: dict[str, Any]) -> None:
    import litellm

    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [part]}]
    assert litellm.completion(messages=messages, user="u", **options).choices
