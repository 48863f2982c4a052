"""LoRA adapters as models of the API: names, cards, and the tokens of each in one batch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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


def model_with_adapters() -> Model:
    transformer = tiny_model(gqa_config(), torch.float64)
    adapters = [drawn_updates(transformer, rank=3, seed=number) for number in (1, 2)]
    requests = {
        name: LoRARequest(
            lora_name=name, lora_int_id=number, lora_path="secret", digest=bytes([number])
        )
        for number, name in enumerate(NAMES, start=1)
    }
    loaded = LoadedAdapters(requests, add_adapters(transformer, adapters))
    return Model(transformer, byte_tokenizer(), name="base", adapters=loaded)


@pytest.fixture
def client() -> Iterator[TestClient]:
    state = make_state(AsyncEngine(model_with_adapters()), ServeConfig())
    with TestClient(build_app(state), base_url=URL) as client:
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


def test_a_batch_of_adapters_gives_the_tokens_of_each(client: TestClient) -> None:
    prompts = ["Once upon a time", "SELECT", "Once upon a time"]
    asked = [(name, prompt) for prompt in prompts for name in ("base", *NAMES)]

    def complete(name: str, prompt: str) -> dict:
        body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 200
        return response.json()

    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda one: complete(*one), asked))
    reference = model_with_adapters()
    texts = set()
    for (name, prompt), answer in zip(asked, answers, strict=True):
        expected = reference.generate(prompt, lora=None if name == "base" else name, max_tokens=8)
        assert answer["model"] == name
        assert answer["choices"][0]["text"] == expected
        texts.add((prompt, answer["choices"][0]["text"]))
    assert len(texts) == 6


def test_chats_with_an_adapter(client: TestClient) -> None:
    answers = set()
    for name in ("base", *NAMES):
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": name, "messages": messages, "max_tokens": 8, "temperature": 0}
        response = client.post("/v1/chat/completions", json=body).json()
        assert response["model"] == name
        answers.add(response["choices"][0]["message"]["content"])
    assert len(answers) == 3
