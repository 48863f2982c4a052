"""The official `anthropic` client, unmodified, against a server of random weights.

The output of random weights means nothing; the test checks its format.
"""

from collections.abc import Iterator

import anthropic
import pytest

from .conftest import KEY, Server
from .tiny_server import CONTEXT, NAME

HELLO: list[anthropic.types.MessageParam] = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0.0}
"""The client itself has no such argument any more."""
WEATHER: anthropic.types.ToolParam = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
FORCED: anthropic.types.ToolChoiceToolParam = {
    "type": "tool",
    "name": "get_weather",
    "disable_parallel_tool_use": True,
}


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as made:
        yield made


def test_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model=NAME, messages=HELLO, max_tokens=8, extra_body=GREEDY)
    assert message.stop_reason in ("max_tokens", "end_turn")
    assert 0 < message.usage.output_tokens <= 8
    counted = client.messages.count_tokens(model=NAME, messages=HELLO)
    cached = message.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == message.usage.input_tokens + cached


def test_a_stream_gathers_what_the_whole_message_has(client: anthropic.Anthropic) -> None:
    options = {"model": NAME, "messages": HELLO, "max_tokens": 20, "extra_body": GREEDY}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [
        block.to_dict() for block in whole.content
    ]
    assert text == "".join(block.text for block in final.content if block.type == "text")
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    read = final.usage.cache_read_input_tokens or 0
    assert final.usage.input_tokens + read == whole.usage.input_tokens + (
        whole.usage.cache_read_input_tokens or 0
    )


def test_tool_use_and_its_result(client: anthropic.Anthropic) -> None:
    options = {
        "model": NAME,
        "max_tokens": 400,
        "tools": [WEATHER],
        "thinking": {"type": "disabled"},
        "extra_body": GREEDY,
    }
    with client.messages.stream(**options, messages=HELLO, tool_choice=FORCED) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert call.name == "get_weather"
    assert call.input["city"] in ("Oslo", "Rome") and call.input["days"] in (1, 2)
    answer: anthropic.types.MessageParam = {"role": "assistant", "content": message.content}
    result: anthropic.types.MessageParam = {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Rain"}],
    }
    after = client.messages.create(**options, messages=[*HELLO, answer, result])
    assert after.usage.input_tokens > 0


def test_beta_requests(client: anthropic.Anthropic) -> None:
    """They carry a query and headers of their own."""
    message = client.beta.messages.create(
        model=NAME,
        messages=HELLO,
        max_tokens=4,
        betas=["context-management-2025-06-27"],
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
    )
    assert message.role == "assistant"


def test_max_tokens_beyond_the_context(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model=NAME, messages=HELLO, max_tokens=32000) as stream:
        next(iter(stream))


def test_errors_are_its_own(client: anthropic.Anthropic, server: Server) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude", messages=HELLO, max_tokens=1)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(
            model=NAME,
            messages=[{"role": "user", "content": "x" * 2 * CONTEXT}],
            max_tokens=1,
        )
    stranger = anthropic.Anthropic(base_url=server.url, api_key="k" * 20, max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model=NAME, messages=HELLO, max_tokens=1)
