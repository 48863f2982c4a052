"""LangChain's ChatOpenAI, unmodified."""

from typing import Literal

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

from .conftest import KEY, Server
from .tiny_server import NAME

pytestmark = pytest.mark.slow

NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}


@tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Weather of a city."""
    return f"Rain in {city}"


class Verdict(BaseModel):
    """A judgement."""

    model_config = ConfigDict(extra="forbid")

    is_good: bool


@pytest.fixture
def model(server: Server) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key=KEY,
        model=NAME,
        max_tokens=300,
        seed=1,
        max_retries=0,
        extra_body=NO_THOUGHTS,
    )


def test_invoke(model: ChatOpenAI) -> None:
    answer = model.invoke([SystemMessage("Be brief"), HumanMessage("Hello")])
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 300


def test_stream(model: ChatOpenAI) -> None:
    messages = [HumanMessage("Hello")]
    chunks = list(model.stream(messages))
    assert "".join(str(chunk.content) for chunk in chunks) == model.invoke(messages).content


def test_batch(model: ChatOpenAI) -> None:
    assert len(model.batch(["a", "b", "c"])) == 3


def test_tools(model: ChatOpenAI) -> None:
    bound = model.bind_tools([get_weather], tool_choice="get_weather", parallel_tool_calls=False)
    answer = bound.invoke("Hello")
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    free = model.bind_tools([get_weather])
    assert free.invoke([HumanMessage("Hello"), answer, result]).response_metadata


def test_streamed_tools(model: ChatOpenAI) -> None:
    bound = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    first, *rest = bound.stream("Hello")
    for chunk in rest:
        first += chunk
    assert first.tool_calls[0]["args"]["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: ChatOpenAI, method: str) -> None:
    structured = model.with_structured_output(Verdict, method=method)
    assert isinstance(structured.invoke("Hello"), Verdict)


def test_logprobs(model: ChatOpenAI) -> None:
    answer = model.bind(logprobs=True, top_logprobs=2).invoke("Hello")
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_a_wrong_field_is_named(model: ChatOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        model.bind(temperature=3.0).invoke("Hello")
    assert (caught.value.status_code, caught.value.param) == (400, "temperature")
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="functions is not supported"):
        model.bind(functions=[]).invoke("Hello")
    with pytest.raises(openai.BadRequestError) as caught:
        list(model.bind(stop=["x" * 300]).stream("Hello"))
    assert str(caught.value.param).startswith("stop")


def test_a_prompt_that_does_not_fit(model: ChatOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        model.invoke("x" * 3000)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


def test_a_wrong_key(server: Server) -> None:
    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key="wrong", model=NAME, max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        model.invoke("Hello")
    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")


def test_a_model_that_is_not_there(server: Server) -> None:
    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key=KEY, model="other", max_retries=0)
    with pytest.raises(openai.NotFoundError) as caught:
        model.invoke("Hello")
    assert (caught.value.status_code, caught.value.param) == (404, "model")
