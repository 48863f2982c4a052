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

from .conftest import KEY, Server
from .tiny_server import NAME

pytestmark = pytest.mark.slow


class Verdict(BaseModel):
    """A judgement."""

    is_good: bool


@function_tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Weather of a city."""
    return f"Rain in {city}"


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
def test_a_tool_is_called_and_answered(server: Server, kind: type[Model]) -> None:
    """The first turn has to call the tool; its result is in the second turn's input."""

    async def run() -> RunResult:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            agent = Agent(
                name="weather",
                instructions="Be brief",
                model=kind(model=NAME, openai_client=client),
                tools=[get_weather],
                output_type=Verdict,
                model_settings=ModelSettings(
                    tool_choice="get_weather", parallel_tool_calls=False, max_tokens=300
                ),
            )
            config = RunConfig(tracing_disabled=True)
            return await Runner.run(agent, "Hello", run_config=config, max_turns=10)

    result = asyncio.run(run())
    calls = [item for item in result.new_items if isinstance(item, ToolCallItem)]
    outputs = [item.output for item in result.new_items if isinstance(item, ToolCallOutputItem)]
    assert len(calls) >= 1
    assert outputs[0] in ("Rain in Oslo", "Rain in Rome")
    assert isinstance(result.final_output, Verdict)
