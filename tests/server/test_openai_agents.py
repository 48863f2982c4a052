"""OpenAI's Agents SDK, unmodified, by Chat Completions and by the Responses API."""

import asyncio
from typing import Literal

import openai
import pytest
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    RunResult,
    ToolCallItem,
    ToolCallOutputItem,
    function_tool,
)
from pydantic import BaseModel

from tests.abuse.local import Local
from tests.clients.scripted import scripted

pytestmark = pytest.mark.slow


class Verdict(BaseModel):
    """A judgement."""

    is_good: bool


@function_tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Weather of a city."""
    return f"Rain in {city}"


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
def test_a_tool_is_called_and_answered(kind: type[Model]) -> None:
    """The first turn has to call the tool; its result is in the second turn's input."""

    def answer(prompt: str) -> str:
        return '{"is_good": true}' if "Rain in Oslo" in prompt else CALL

    async def run(server: Local) -> RunResult:
        url = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            agent = Agent(
                name="weather",
                instructions="Be brief",
                model=kind(model=server.model.name, openai_client=client),
                tools=[get_weather],
                output_type=Verdict,
                model_settings=ModelSettings(
                    tool_choice="get_weather", parallel_tool_calls=False, max_tokens=300
                ),
            )
            return await Runner.run(agent, "Hello", run_config=RunConfig(tracing_disabled=True))

    with scripted(answer) as (server, engine):
        result = asyncio.run(run(server))
    assert sum(isinstance(item, ToolCallItem) for item in result.new_items) == 1
    outputs = [item.output for item in result.new_items if isinstance(item, ToolCallOutputItem)]
    assert outputs == ["Rain in Oslo"]
    assert result.final_output == Verdict(is_good=True)
    first, second = engine.prompts
    assert "Hello" in first and "get_weather" in first and "Rain in Oslo" in second
    assert all(asked.grammar is not None for asked in engine.asked)
