"""LoRA adapters as models of the API: names, cards, and the tokens of each in one batch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from starlette.testclient import TestClient

from lowlat.engine.request import LoRARequest
from lowlat.generate.lora import LoadedAdapters
from lowlat.generate.model import Model
from lowlat.model.lora import add_adapters
from lowlat.model.native import weight_bytes
from lowlat.serve.app import build_app, make_state
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from tests.fakes import byte_tokenizer, gqa_config, tiny_model
from tests.lora import drawn_updates

from .conftest import URL

NAMES = ("sql", "team/chat")


def model_with_adapters(names: Sequence[str] = NAMES) -> Model:
    """A model with adapters whose weights follow from their names."""
    transformer = tiny_model(gqa_config(), torch.float64)
    seeds = [1 + NAMES.index(name) for name in names]
    adapters = [drawn_updates(transformer, rank=3, seed=seed) for seed in seeds]
    requests = {
        name: LoRARequest(
            lora_name=name, lora_int_id=number, lora_path="secret", digest=bytes([number])
        )
        for number, name in enumerate(names, start=1)
    }
    loaded = LoadedAdapters(requests, add_adapters(transformer, adapters))
    return Model(transformer, byte_tokenizer(), name="base", adapters=loaded)


@contextmanager
def serving(*names: str) -> Iterator[TestClient]:
    state = make_state(AsyncEngine(model_with_adapters(names)), ServeConfig())
    with TestClient(build_app(state), base_url=URL) as client:
        yield client


@pytest.fixture
def client() -> Iterator[TestClient]:
    with serving(*NAMES) as client:
        yield client


def test_models_lists_adapters_with_their_parent(client: TestClient) -> None:
    response = client.get("/v1/models")
    cards = {card["id"]: card for card in response.json()["data"]}
    assert list(cards) == ["base", *NAMES]
    assert [card["parent"] for card in cards.values()] == [None, "base", "base"]
    assert "secret" not in response.text
    for name, card in cards.items():
        assert client.get(f"/v1/models/{name}").json() == card


def test_ollama_lists_adapters_with_their_parent(client: TestClient) -> None:
    tags = client.get("/api/tags").json()["models"]
    assert [tag["name"] for tag in tags] == ["base", *NAMES]
    assert [tag["details"]["parent_model"] for tag in tags] == ["", "base", "base"]
    assert len({tag["digest"] for tag in tags}) == 3
    for tag in tags:
        shown = client.post("/api/show", json={"model": tag["name"]}).json()
        assert shown["details"] == tag["details"]


def test_the_bytes_of_a_model_include_its_adapters() -> None:
    model = model_with_adapters()
    plain = tiny_model(gqa_config(), torch.float64)
    drawn = [drawn_updates(plain, rank=3, seed=number) for number in (1, 2)]
    updates = sum(u.a.nbytes + u.b.nbytes for adapter in drawn for u in adapter.values())
    assert updates > 0
    assert weight_bytes(model.transformer) == weight_bytes(plain) + updates


def test_an_unknown_adapter(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"model": "x", "prompt": "a"})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == (
        "the model 'x' does not exist; this server serves 'base', 'sql', 'team/chat'"
    )


def complete(client: TestClient, name: str, prompt: str) -> str:
    body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert response.json()["model"] == name
    return response.json()["choices"][0]["text"]


def test_a_batch_of_adapters_gives_the_tokens_of_servers_with_one_each(client: TestClient) -> None:
    prompts = ["Once upon a time", "SELECT", "Once upon a time"]
    asked = [(name, prompt) for prompt in prompts for name in ("base", *NAMES)]
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda one: complete(client, *one), asked))
    expected = {}
    for name in ("base", *NAMES):
        with serving(*({name} & {*NAMES})) as alone:
            expected |= {(name, prompt): complete(alone, name, prompt) for prompt in prompts}
    assert found == [expected[each] for each in asked]
    assert len({(prompt, text) for (_, prompt), text in expected.items()}) == 6


def test_chats_with_an_adapter(client: TestClient) -> None:
    answers = set()
    for name in ("base", *NAMES):
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": name, "messages": messages, "max_tokens": 8, "temperature": 0}
        response = client.post("/v1/chat/completions", json=body).json()
        assert response["model"] == name
        answers.add(response["choices"][0]["message"]["content"])
    assert len(answers) == 3
