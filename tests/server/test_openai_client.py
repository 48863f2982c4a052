"""The official `openai` client, unmodified, against a server of random weights.

The output of random weights means nothing; the test checks its format.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from .conftest import KEY, Server
from .tiny_server import CONTEXT, NAME

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
HELLO = [{"role": "user", "content": "Hello"}]
NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}
LETTERS = {"allowed_token_ids": [*b"abcdefgh"], "ignore_eos": True}
"""A random model may end its turn at any token, or draw one that chats do not show."""
JSON_TOKENS = 400
"""Enough for the JSON here, whatever white space a random model puts between its parts."""


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == CONTEXT


def test_chat_is_repeatable_with_a_seed(client: openai.OpenAI) -> None:
    answers = [
        client.chat.completions.create(
            model=NAME,
            messages=HELLO,
            max_tokens=12,
            seed=seed,
            temperature=1.0,
            extra_body=LETTERS,
        )
        for seed in (1, 1, 2)
    ]
    contents = [answer.choices[0].message.content for answer in answers]
    assert contents[0] == contents[1] != contents[2]
    assert answers[0].choices[0].finish_reason == "length"
    usage = answers[1].usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12


def test_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    options = {"model": NAME, "messages": HELLO, "max_tokens": 20, "seed": 3}
    options["extra_body"] = LETTERS
    whole = client.chat.completions.create(**options).choices[0].message.content
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    text, usages = "", []
    for chunk in stream:
        usages.append(chunk.usage)
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == whole
    assert usages[-1] is not None and usages[-1].completion_tokens == 20
    assert usages[:-1] == [None] * (len(usages) - 1)


def test_a_stream_can_be_left(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=NAME, messages=HELLO, max_tokens=1500, stream=True
    ) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=1).choices


def test_several_completions(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=HELLO, max_tokens=8, n=3, temperature=0, top_p=0.5
    )
    contents = {choice.message.content for choice in answer.choices}
    assert len(answer.choices) == 3
    assert len(contents) == 1


def test_logprobs(client: openai.OpenAI) -> None:
    options = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    options |= {"logprobs": True, "top_logprobs": 3}

    def logprobs_of(**body: object) -> tuple[str | None, list[Any]]:
        choice = client.chat.completions.create(**options, extra_body=body).choices[0]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        return choice.message.content, choice.logprobs.content

    _, likeliest = logprobs_of(ignore_eos=True)
    assert likeliest
    for entry in likeliest:
        assert len(entry.top_logprobs) == 3
        # Greedy decoding takes the likeliest token.
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0.0
    text, entries = logprobs_of(**LETTERS)
    assert len(entries) == 12
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == text


def test_stop(client: openai.OpenAI) -> None:
    options = {"model": NAME, "messages": HELLO, "seed": 5, "logit_bias": {str(ord("z")): 100}}
    answer = client.chat.completions.create(**options, max_tokens=40, stop=["zz"])
    assert answer.choices[0].finish_reason == "stop"
    assert "zz" not in (answer.choices[0].message.content or "")


def test_tool_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME,
        messages=HELLO,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        seed=1,
        extra_body=NO_THOUGHTS,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls or []
    assert calls
    assert calls[0].function.name == "get_weather"
    assert json.loads(calls[0].function.arguments)["city"] in ("Oslo", "Rome")
    results = [{"role": "tool", "tool_call_id": call.id, "content": "Rain"} for call in calls]
    after = client.chat.completions.create(
        model=NAME,
        messages=[*HELLO, choice.message, *results],
        tools=[WEATHER],
        max_tokens=3,
        extra_body={"ignore_eos": True},
    )
    assert after.choices[0].finish_reason == "length"


def test_streamed_tool_call(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(
        model=NAME,
        messages=HELLO,
        tools=[WEATHER],
        tool_choice=named,
        parallel_tool_calls=False,
        seed=2,
        extra_body=NO_THOUGHTS,
    ) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    (call,) = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments)["days"] in (1, 2)


ABC = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["abc"]}}}
EFFORT = {"effort": "none"}
"""A random model that opens <think> may not close it before the context ends."""


class Person(BaseModel):
    name: str
    is_adult: bool


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model=NAME,
        messages=HELLO,
        response_format=form,
        seed=1,
        max_tokens=JSON_TOKENS,
        extra_body=NO_THOUGHTS,
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"ok", "kind"}
    assert value["kind"] in ("a", "b")


def test_parsed_answers(client: openai.OpenAI) -> None:
    """The form that a pydantic class asks for; `"` is made likely so that texts end."""
    answer = client.chat.completions.parse(
        model=NAME,
        messages=HELLO,
        response_format=Person,
        seed=1,
        max_tokens=JSON_TOKENS,
        logit_bias={str(ord('"')): 30},
        extra_body=NO_THOUGHTS,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_extensions(client: openai.OpenAI) -> None:
    fields = {"structured_outputs": {"choice": ["yes", "no"]}, "top_k": 5, "priority": 1}
    answer = client.chat.completions.create(
        model=NAME, messages=HELLO, temperature=0, extra_body={**NO_THOUGHTS, **fields}
    )
    assert answer.choices[0].message.content in ("yes", "no")
    assert answer.choices[0].finish_reason == "stop"


def test_fields_of_vllm(client: openai.OpenAI) -> None:
    def content(**body: object) -> str:
        answer = client.chat.completions.create(
            model=NAME, messages=HELLO, seed=1, extra_body={**NO_THOUGHTS, **body}
        )
        return answer.choices[0].message.content or ""

    assert re.fullmatch("[0-9]{3}", content(guided_regex="[0-9]{3}"))
    assert content(guided_choice=["north", "south"]) in ("north", "south")
    assert set(json.loads(content(guided_json=WEATHER["function"]["parameters"]))) == {
        "city", "days"
    }  # fmt: skip
    few = {"allowed_token_ids": [ord("a"), ord("b")], "max_tokens": 20}
    assert re.fullmatch("[ab]{20}", content(**few, min_tokens=20, top_k=-1))
    assert content(**few, stop_token_ids=[ord("b")]).strip("a") == ""
    # "z" is in no token but that of the byte.
    words = {"bad_words": ["z"], "logit_bias": {str(ord("z")): 100}, "max_tokens": 20}
    assert "z" not in content(**words)
    answer = client.completions.create(
        model=NAME, prompt="Hi", max_tokens=3, extra_body={**LETTERS, "return_token_ids": True}
    )
    choice = answer.choices[0].model_dump()
    assert (choice["prompt_token_ids"], len(choice["token_ids"])) == ([*b"Hi"], 3)
    whole = client.completions.create(model=NAME, prompt="Hi", max_tokens=-1, seed=2)
    assert whole.choices[0].finish_reason in ("stop", "length")
    messages = [*HELLO, {"role": "assistant", "content": "The answer"}]
    prefill = {"continue_final_message": True, "add_generation_prompt": False, **LETTERS}
    answer = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=3, extra_body=prefill
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=NAME, prompt=["a", "b"], max_tokens=4, echo=True, seed=1
    )
    assert [choice.text[0] for choice in answer.choices] == ["a", "b"]
    stream = client.completions.create(
        model=NAME,
        prompt="a",
        max_tokens=4,
        logprobs=2,
        stream=True,
        temperature=0,
        extra_body=LETTERS,
    )
    tokens = [token for chunk in stream for token in chunk.choices[0].logprobs.tokens]
    assert len(tokens) == 4


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=NAME, input="Hello", max_output_tokens=6, store=False)
    assert answer.status in ("incomplete", "completed")
    assert answer.usage is not None and 1 <= answer.usage.output_tokens <= 6


def test_streamed_responses(client: openai.OpenAI) -> None:
    text = ""
    with client.responses.stream(
        model=NAME, input="Hello", temperature=0, text=ABC, reasoning=EFFORT
    ) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
        answer = stream.get_final_response()
    assert answer.output_text == text
    assert json.loads(text) == "abc"


def test_responses_with_tools(client: openai.OpenAI) -> None:
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    choice = {"type": "function", "name": "get_weather"}
    answer = client.responses.create(
        model=NAME,
        input="Hello",
        temperature=0,
        tools=[tool],
        tool_choice=choice,
        parallel_tool_calls=False,
        reasoning=EFFORT,
    )
    call = answer.output[-1]
    assert call.type == "function_call"
    assert json.loads(call.arguments)["days"] in (1, 2)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}
    after = client.responses.create(
        model=NAME,
        input=[{"role": "user", "content": "Hello"}, *answer.output, result],
        tools=[tool],
        max_output_tokens=3,
    )
    assert after.status in ("incomplete", "completed")


def test_stored_responses(client: openai.OpenAI) -> None:
    options = {"model": NAME, "text": ABC, "reasoning": EFFORT}
    first = client.responses.create(**options, input="Hello")
    second = client.responses.create(**options, input="More", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(second.id) == second
    items = list(client.responses.input_items.list(second.id, limit=1, order="asc"))
    assert [item.type for item in items] == ["message"] * 3
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="is not stored") as caught:
        client.responses.create(**options, input="x", previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"
    # It holds the conversation before it.
    assert client.responses.create(**options, input="x", previous_response_id=second.id).output


def test_a_custom_tool_with_a_grammar(client: openai.OpenAI) -> None:
    definition = 'start: "+\\"" DIGIT LF "\\\\"\n%import common.DIGIT\n%import common.LF'
    tool = {
        "type": "custom",
        "name": "patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": definition},
    }
    response = client.responses.create(
        model=NAME,
        input="Hello",
        tools=[tool],
        tool_choice={"type": "custom", "name": "patch"},
        reasoning=EFFORT,
    )
    (call,) = response.output
    assert call.type == "custom_tool_call"
    assert re.fullmatch(r'\+"[0-9]\n\\', call.input)
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
    more = client.responses.create(
        model=NAME, input=[result], tools=[tool], previous_response_id=response.id,
        tool_choice="none", max_output_tokens=4,
    )  # fmt: skip
    assert more.status in ("completed", "incomplete")


def test_responses_with_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    answer = client.responses.create(
        model=NAME, input="Hello", temperature=0, text={"format": form}, reasoning=EFFORT
    )
    assert json.loads(answer.output_text)["ok"] in (True, False)


def test_errors_are_those_the_client_knows(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=HELLO, temperature=3)
    assert bad.value.param == "temperature"
    assert bad.value.request_id is not None
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "x" * CONTEXT}]
        )
    assert long.value.param == "messages"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError) as late:
        client.chat.completions.create(
            model=NAME,
            messages=HELLO,
            max_tokens=1900,
            extra_body={"deadline_seconds": 0.02, "ignore_eos": True},
        )
    assert late.value.status_code == 408
