"""POST /v1/completions over the fake engine."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.serve.protocol.limits import MAX_PROMPTS
from lowlat.serve.routes.completions import CompletionResponse

from .conftest import assert_refused
from .fake_engine import NAME, Answer, FakeEngine
from .test_chat_route import chunks_of

PATH = "/v1/completions"
BODY: dict[str, Any] = {"model": NAME, "prompt": "Once"}


def test_complete_response(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post(PATH, json=BODY).json()
    CompletionResponse.model_validate(answer)
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["usage"]["total_tokens"] == 4 + 5
    assert answer["lowlat"]["tokens_per_second"] == 8.0
    assert engine.asked[0].prompt == list(b"Once")
    assert engine.asked[0].params.max_tokens == 16
    assert engine.asked[0].params.temperature == 1.0


def test_the_default_length_fits_the_context(client: TestClient, engine: FakeEngine) -> None:
    """Regression: an error that asks to leave out a field the client has not set."""
    context = engine.model.context
    prompts = ["x" * (context - left) for left in (20, 16, 15, 1)]
    assert client.post(PATH, json={**BODY, "prompt": prompts}).status_code == 200
    assert [asked.params.max_tokens for asked in engine.asked] == [16, 16, 15, 1]


def test_prompts_are_taken_together_or_not_at_all(client: TestClient, engine: FakeEngine) -> None:
    body = {**BODY, "prompt": ["a", "b", "c"]}
    engine.room = 2
    assert client.post(PATH, json=body).status_code == 429
    engine.room = 3
    assert client.post(PATH, json=body).status_code == 200
    engine.max_queue = 2
    answer = client.post(PATH, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "prompt: 3 prompts exceed the queue of this server (2); send fewer per request"
    )
    assert answer.json()["error"]["param"] == "prompt"
    assert len(engine.asked) == 3


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [[97, 98]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompt_types(
    client: TestClient, engine: FakeEngine, prompt: Any, prompts: list[list[int]]
) -> None:
    answer = client.post(PATH, json={**BODY, "prompt": prompt, "n": 2}).json()
    assert [asked.prompt for asked in engine.asked] == prompts
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(prompts)))
    assert all(choice["text"] == "Hello" for choice in answer["choices"])
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == 10 * len(prompts)


def test_only_a_prompt_without_text_begins_a_text(client: TestClient, engine: FakeEngine) -> None:
    """Regression: a tokenizer that drops the space between a prompt and its continuation."""
    client.post(PATH, json={**BODY, "prompt": [[256], [256, 97]]})
    assert [asked.begins_text for asked in engine.asked] == [True, False]


def test_stream_of_several_prompts(client: TestClient) -> None:
    body = {**BODY, "prompt": ["a", "b"], "n": 2, "echo": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    *chunks, last = chunks_of(client.post(PATH, json=body).text)
    texts, reasons = [""] * 4, [None] * 4
    for chunk in chunks:
        CompletionResponse.model_validate(chunk)
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == ["aHello", "aHello", "bHello", "bHello"]
    assert reasons == ["stop"] * 4
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 20
    assert last["lowlat"]["prefill_seconds"] == 0.25


def test_echo_of_token_ids_is_their_text(client: TestClient) -> None:
    answer = client.post(PATH, json={**BODY, "prompt": [97, 98], "echo": True}).json()
    assert answer["choices"][0]["text"] == "abHello"


def test_logprobs(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = Answer(text="aé!")
    body = {**BODY, "logprobs": 2}
    logprobs = client.post(PATH, json=body).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
    parts = [
        chunk["choices"][0]["logprobs"]
        for chunk in chunks_of(client.post(PATH, json={**body, "stream": True}).text)
    ]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [entry for part in parts for entry in part[name]] == logprobs[name]


def test_structured_output_is_compiled(client: TestClient, engine: FakeEngine) -> None:
    body = {**BODY, "structured_outputs": {"choice": ["yes", "no"]}}
    assert client.post(PATH, json=body).status_code == 200
    assert engine.asked[0].grammar is not None


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "("},
        {"regex": "(?=a)b"},
        {"grammar": "start: nothing"},
        {"json": {"type": "strange"}},
        {"choice": [""]},
    ],
)
def test_invalid_structured_outputs_are_rejected(
    client: TestClient, engine: FakeEngine, form: dict[str, Any]
) -> None:
    response = client.post(PATH, json={**BODY, "structured_outputs": form})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("structured_outputs")
    assert engine.asked == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"echo": True, "logprobs": 0, "stream": True}, "echo"),
        ({"logprobs": 20, "n": 7}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"messages": []}, "messages"),
    ],
)
def test_refusals_name_the_field(
    client: TestClient, engine: FakeEngine, change: dict[str, Any], param: str
) -> None:
    assert_refused(client, engine, PATH, {**BODY, **change}, param)


def test_a_long_list_of_wrong_ids_costs_one_error(client: TestClient) -> None:
    """Regression: a record of an error for each of a million wrong items."""
    body = json.dumps({**BODY, "prompt": ["x", *range(100_000)]})
    response = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert len(response.text) < 1000


def test_prompts_admitted_before_a_refusal_are_given_up(
    client: TestClient, engine: FakeEngine
) -> None:
    """Regression: half of a request's prompts running on after the other half was refused."""
    from lowlat.serve.generation import Overloaded

    submit = engine.submit

    async def submit_one(*args: Any, **kwargs: Any) -> Any:
        if engine.asked:
            raise Overloaded(7)
        return await submit(*args, **kwargs)

    engine.submit = submit_one
    response = client.post(PATH, json={**BODY, "prompt": ["a", "b"]})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert engine.generations[0].is_cancelled
