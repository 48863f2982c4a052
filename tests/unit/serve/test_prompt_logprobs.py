"""Log-probabilities of prompts: by the engine, in completions and in chats."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from lowlat.engine.request import RequestOptions
from lowlat.engine.scheduler import PROMPT_LOGPROB_TOKENS
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.serve.app import build_app, make_state
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.protocol import limits
from tests.fakes import gqa_config, tiny_model

from .templates import tokenizer_of

TEXT = "naïve 😀 prompt"
CLOSE = {"rel": 1e-4, "abs": 1e-5}


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


def make_model() -> Model:
    tokenizer = tokenizer_of("hermes")
    config = gqa_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    return Model(tiny_model(config, torch.float32), tokenizer, name="tiny")


@pytest.fixture(scope="module")
def served() -> Iterator[TestClient]:
    """A server of an equal model, which runs in a thread of its own."""
    state = make_state(AsyncEngine(make_model()), ServeConfig())
    with TestClient(build_app(state), base_url="http://127.0.0.1:8000") as client:
        yield client


def logprobs_of(model: Model, ids: list[int]) -> torch.Tensor:
    """[tokens - 1, vocab]: row i is about token i + 1, by the whole model at once."""
    return torch.log_softmax(model.logits(ids)[:-1].double(), dim=-1)


def post(client: TestClient, **body: Any) -> Any:
    response = client.post("/v1/completions", json={"model": "tiny", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("length", [2, 5, PROMPT_LOGPROB_TOKENS, 2 * PROMPT_LOGPROB_TOKENS + 3])
def test_the_engine_scores_prompts(model: Model, length: int) -> None:
    """In chunks, beside another prompt with the same start, and again with a full prefix cache."""
    ids = [(7 * index + 3) % 250 for index in range(length)]
    expected = logprobs_of(model, ids)
    for _ in range(2):
        for entries in model.prompt_logprobs([ids, ids], top=3):
            assert [entry.token for entry in entries] == ids[1:]
            for row, entry in zip(expected, entries, strict=True):
                assert entry.logprob == pytest.approx(float(row[entry.token]), **CLOSE)
                assert entry.rank == 1 + int((row > row[entry.token]).sum())
                best = sorted(range(len(row)), key=lambda token: -float(row[token]))[:3]
                assert [token for token, _ in entry.top] == best
                values = [float(row[token]) for token in best]
                assert [value for _, value in entry.top] == pytest.approx(values, **CLOSE)


def test_a_prompt_of_one_token(model: Model) -> None:
    assert [list(entries) for entries in model.prompt_logprobs([[5]], top=2)] == [[]]


def test_preempted_prompts_are_scored_again(model: Model) -> None:
    ids = [(index * 7) % 250 for index in range(300)]
    (expected,) = model.prompt_logprobs([ids])
    options = RequestOptions(prompt_logprobs=0)
    request = model.session.add(ids, SamplingParams(max_tokens=1), options)
    model.session.step()
    assert 0 < len(request.request.prompt_logprobs) < 200
    (sequence,) = model.engine.scheduler.running
    model.engine.scheduler._preempt(sequence)
    while not request.is_finished:
        model.session.step()
    assert list(request.request.prompt_logprobs) == list(expected)


def test_echo_with_logprobs(served: TestClient, model: Model) -> None:
    answer = post(served, prompt=TEXT, max_tokens=3, echo=True, logprobs=2)
    plain = post(served, prompt=TEXT, max_tokens=3, logprobs=2)["choices"][0]
    (choice,) = answer["choices"]
    found, tail = choice["logprobs"], plain["logprobs"]
    assert choice["text"] == TEXT + plain["text"]
    ids = model.tokenizer.encode(TEXT)
    rows = logprobs_of(model, ids)
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for place, row in enumerate(rows, 1):
        expected = float(row[ids[place]])
        assert found["token_logprobs"][place] == pytest.approx(expected, **CLOSE)
        assert max(found["top_logprobs"][place].values()) == pytest.approx(
            float(row.max()), **CLOSE
        )
        assert len(found["top_logprobs"][place]) == 2
    count = len(ids)
    assert found["tokens"][count:] == tail["tokens"]
    assert found["token_logprobs"][count:] == pytest.approx(tail["token_logprobs"], **CLOSE)
    assert [set(top) for top in found["top_logprobs"][count:]] == [
        set(top) for top in tail["top_logprobs"]
    ]
    assert found["text_offset"][count:] == [len(TEXT) + start for start in tail["text_offset"]]
    assert found["text_offset"][:count] == [
        len(TEXT.encode()[:place].decode(errors="ignore")) + (TEXT.encode()[place] & 0xC0 == 0x80)
        for place in range(count)
    ]
    assert answer["usage"]["prompt_tokens"] == count and "prompt_logprobs" not in choice


def test_nothing_is_generated_with_max_tokens_0(served: TestClient) -> None:
    answer = post(served, prompt=[TEXT, "b"], max_tokens=0, echo=True, logprobs=1)
    assert [choice["text"] for choice in answer["choices"]] == [TEXT, "b"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    counts = [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]]
    assert counts == [len(TEXT.encode()), 1]
    assert answer["usage"]["completion_tokens"] == 0
    assert post(served, prompt="b", max_tokens=0)["choices"][0]["text"] == ""
    text = served.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": "b", "max_tokens": 0, "stream": True, "echo": True},
    ).text
    assert '"text":"b"' in text and text.endswith("data: [DONE]\n\n")


def test_prompt_logprobs_in_vllms_shape(served: TestClient, model: Model) -> None:
    ids = list(b"hello world")
    (choice,) = post(served, prompt=ids, max_tokens=1, prompt_logprobs=2)["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None and choice["logprobs"] is None
    for row, token, shown in zip(logprobs_of(model, ids), ids[1:], others, strict=True):
        assert len(shown) in (2, 3)
        own = shown[str(token)]
        assert own["logprob"] == pytest.approx(float(row[token]), **CLOSE)
        assert own["rank"] == 1 + int((row > row[token]).sum())
        assert own["decoded_token"] == chr(token)
        assert min(entry["rank"] for entry in shown.values()) == 1
    (only,) = post(served, prompt=ids, max_tokens=1, prompt_logprobs=0)["choices"]
    assert all(len(entry) == 1 for entry in only["prompt_logprobs"][1:])


def test_prompt_logprobs_of_a_chat(served: TestClient) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    plain = served.post("/v1/chat/completions", json=body).json()
    assert "prompt_logprobs" not in plain
    answer = served.post("/v1/chat/completions", json={**body, "prompt_logprobs": 1}).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None
    values = [e["logprob"] for entry in answer["prompt_logprobs"][1:] for e in entry.values()]
    assert all(math.isfinite(value) and value <= 0.0 for value in values)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "x", "stream": True, "echo": True, "logprobs": 1}, "echo"),
        ("completions", {"prompt": "x", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ("completions", {"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
        ("completions", {"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs"),
        ("completions", {"prompt": "x", "max_tokens": -2}, "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": False}, "max_tokens"),
        (
            "chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "stream": True,
                "prompt_logprobs": 1,
            },
            "prompt_logprobs",
        ),
    ],
)
def test_what_is_refused(served: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    response = served.post(f"/v1/{path}", json={"model": "tiny", **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_their_number_is_bounded(served: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PROMPT_LOGPROBS", 40)
    body = {"model": "tiny", "prompt": ["x" * 10, "y" * 10], "max_tokens": 1, "echo": True}
    assert served.post("/v1/completions", json={**body, "logprobs": 1}).status_code == 200
    for more, param in (
        ({"logprobs": 2}, "logprobs"),
        ({"prompt_logprobs": 2}, "prompt_logprobs"),
        ({"logprobs": 1, "n": 2, "temperature": 1.0}, "logprobs"),
    ):
        response = served.post("/v1/completions", json={**body, **more})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
