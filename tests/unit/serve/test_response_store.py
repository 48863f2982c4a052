"""Stored responses: continued, read, deleted; bounded memory, one namespace per API key."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.serve.response_store import ENTRY_BYTES, ResponseStore, StoredResponse
from lowlat.serve.routes.responses import ResponseObject

from .conftest import MakeClient
from .fake_engine import NAME, Answer, FakeEngine, tiny
from .templates import tokenizer_of

PATH = "/v1/responses"
KEYS = ("a" * 32, "b" * 32)


@pytest.fixture
def client(make_client: MakeClient, engine: FakeEngine) -> TestClient:
    engine.model = tiny(tokenizer_of("hermes"), context=2000)
    return make_client()


def prompt_of(engine: FakeEngine) -> str:
    return engine.model.tokenizer.decode(engine.asked[-1].prompt, skip_special_tokens=False)


def create(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"model": NAME, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_response_is_continued(client: TestClient, engine: FakeEngine) -> None:
    first = create(client, input="One", instructions="Be kind")
    second = create(client, input="Two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    create(client, input="Three", previous_response_id=second["id"], store=False)
    text = prompt_of(engine)
    places = [text.index(word) for word in ("One", "Hello", "Two", "Three")]
    assert places == sorted(places) and text.count("Hello") == 2
    # Instructions are those of one request only.
    assert "Be kind" not in text


def test_a_streamed_response_is_continued(client: TestClient, engine: FakeEngine) -> None:
    text = client.post(PATH, json={"model": NAME, "input": "One", "stream": True}).text
    id = text.split('"id":"resp_')[1].split('"')[0]
    create(client, input="Two", previous_response_id=f"resp_{id}")
    assert "One" in prompt_of(engine) and "Hello" in prompt_of(engine)


def test_calls_of_long_names_are_continued(client: TestClient, engine: FakeEngine) -> None:
    """Regression: a call whose name requests could not contain broke previous_response_id."""
    name = "n" * 128
    call = f'{{"name": "{name}", "arguments": {{}}}}'
    engine.answer = Answer(text=f"<tool_call>\n{call}\n</tool_call>")
    tools = [{"type": "function", "name": "f"}]
    first = create(client, input="One", tools=tools)
    (call,) = first["output"]
    assert (call["type"], call["name"]) == ("function_call", name)
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "R"}
    create(client, input=[result], previous_response_id=first["id"], tools=tools)
    assert name in prompt_of(engine)


@pytest.mark.parametrize("stored", [True, None])
def test_reading_and_deleting(client: TestClient, stored: bool | None) -> None:
    made = create(client, input="One", store=stored)
    assert made["store"] is True
    ResponseObject.model_validate(made)
    url = f"{PATH}/{made['id']}"
    assert client.get(url).json() == made
    assert client.delete(url).json() == {"id": made["id"], "object": "response", "deleted": True}
    for response in (client.get(url), client.delete(url), client.get(f"{url}/input_items")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "response_not_found"
    body = {"model": NAME, "input": "x", "previous_response_id": made["id"]}
    response = client.post(PATH, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "previous_response_id")
    assert error["code"] == "previous_response_not_found"


def test_nothing_is_stored_unasked(client: TestClient, engine: FakeEngine) -> None:
    made = create(client, input="One", store=False)
    assert made["store"] is False
    assert client.get(f"{PATH}/{made['id']}").status_code == 404
    engine.answer = Answer(finish_reason="error", error="broken")
    text = client.post(PATH, json={"model": NAME, "input": "One", "stream": True}).text
    id = text.split('"id":"')[1].split('"')[0]
    assert "response.failed" in text
    assert client.get(f"{PATH}/{id}").status_code == 404


def test_input_items(client: TestClient) -> None:
    items = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Three"}]},
    ]
    first = create(client, input=items)
    second = create(client, input="Four", previous_response_id=first["id"])
    url = f"{PATH}/{second['id']}/input_items"
    page = client.get(url).json()
    texts = [item["content"][0]["text"] for item in page["data"]]
    assert texts == ["Four", "Hello", "Three", "Two", "One"]
    assert page["has_more"] is False
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
    query = {"limit": 2, "order": "asc"}
    one = client.get(url, params=query).json()
    two = client.get(url, params={**query, "after": one["last_id"]}).json()
    three = client.get(url, params={**query, "after": two["last_id"]}).json()
    assert [page["has_more"] for page in (one, two, three)] == [True, True, False]
    paged = [item["id"] for page in (one, two, three) for item in page["data"]]
    assert paged == [item["id"] for item in client.get(url).json()["data"]][::-1]
    wrong = [("limit", 0), ("limit", "x"), ("limit", 101), ("order", "up"), ("after", "x")]
    for name, value in [*wrong, ("z", 1)]:
        response = client.get(url, params={name: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def test_keys_reach_their_own_responses_only(make_client: MakeClient, engine: FakeEngine) -> None:
    engine.model = tiny(tokenizer_of("hermes"), context=2000)
    client = make_client(api_keys=KEYS)
    mine, other = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    body = {"model": NAME, "input": "One"}
    id = client.post(PATH, json=body, headers=mine).json()["id"]
    assert client.get(f"{PATH}/{id}", headers=mine).status_code == 200
    assert client.get(f"{PATH}/{id}").status_code == 401
    assert client.get(f"{PATH}/{id}", headers=other).status_code == 404
    assert client.delete(f"{PATH}/{id}", headers=other).status_code == 404
    body["previous_response_id"] = id
    assert client.post(PATH, json=body, headers=other).status_code == 400
    assert client.post(PATH, json=body, headers=mine).status_code == 200


def record(size: int) -> StoredResponse:
    return StoredResponse(items=b"", response=b"x" * (size - ENTRY_BYTES))


def test_the_least_recently_used_give_way() -> None:
    store = ResponseStore(3000)
    for id in "abc":
        store.put(b"", id, record(1000))
    assert store.get(b"", "a") is not None
    store.put(b"", "d", record(1000))
    assert store.get(b"", "b") is None
    assert [id for id in "acd" if store.get(b"", id)] == ["a", "c", "d"]
    store.put(b"", "e", record(3001))
    assert store.get(b"", "e") is None and store.num_bytes == 3000


def test_a_key_evicts_its_own_responses() -> None:
    store = ResponseStore(4000)
    store.put(b"other", "o", record(1500))
    for number in range(20):
        store.put(b"mine", f"{number}", record(1000))
        assert store.num_bytes <= 4000
    assert store.get(b"other", "o") is not None
    assert store.get(b"other", "19") is None and store.get(b"mine", "19") is not None
    assert store.delete(b"mine", "19") and not store.delete(b"mine", "19")
