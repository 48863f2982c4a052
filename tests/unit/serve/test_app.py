"""The application: model card, health states, error format."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.serve.app import build_app, make_state
from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import Draining, EngineDead, Overloaded
from lowlat.serve.protocol.errors import ErrorResponse
from lowlat.serve.routes.context import RequestContext
from lowlat.utils.errors import UserError

from .conftest import URL, MakeClient
from .fake_engine import NAME, FakeEngine

BODY = {"model": NAME, "prompt": "x"}


def test_the_model_is_described(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert card == client.get(f"/v1/models/{NAME}").json()
    assert card["id"] == NAME
    assert card["max_model_len"] == 97
    assert card["cache_bytes_per_token"] > 0
    assert card["has_chat_template"] is True
    assert card["supports_tools"] is False
    assert card["reasoning"] is False


def test_the_model_can_have_another_name(make_client: MakeClient) -> None:
    client = make_client(model_name="org/name")
    assert client.get("/v1/models/org/name").json()["id"] == "org/name"
    assert client.get(f"/v1/models/{NAME}").status_code == 404
    answer = client.post("/v1/completions", json={**BODY, "model": "org/name"}).json()
    assert answer["model"] == "org/name"


def test_health_follows_the_engine(client: TestClient, engine: FakeEngine) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    engine.is_healthy = False
    for path in ("/health", "/ready"):
        response = client.get(path)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_stopped"


def test_draining_refuses_what_is_new(engine: FakeEngine) -> None:
    state = make_state(engine, ServeConfig())
    client = TestClient(build_app(state), base_url=URL)
    state.is_draining = True
    assert client.get("/health").status_code == 200
    for response in (client.get("/ready"), client.post("/v1/completions", json=BODY)):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == "shutting_down"
    assert engine.asked == []


def test_the_lifespan_drains_the_engine(engine: FakeEngine) -> None:
    with TestClient(build_app(make_state(engine, ServeConfig())), base_url=URL) as client:
        assert client.get("/ready").status_code == 200
        assert engine.drained == []
    assert engine.drained == [0.0]


@pytest.mark.parametrize(
    ("refusal", "status", "headers"),
    [
        (Overloaded(3), 429, {"retry-after": "3"}),
        (Draining(), 503, {"retry-after": "5"}),
        (EngineDead("x"), 503, {}),
        (UserError("prompt must have tokens"), 400, {}),
        (RuntimeError("secret detail"), 500, {}),
        (AssertionError("secret detail"), 500, {}),
    ],
)
def test_refusals_of_the_engine(
    client: TestClient,
    engine: FakeEngine,
    refusal: Exception,
    status: int,
    headers: dict[str, str],
) -> None:
    engine.refusal = refusal
    response = client.post("/v1/completions", json=BODY)
    assert response.status_code == status
    ErrorResponse.model_validate(response.json())
    assert headers.items() <= dict(response.headers).items()
    assert "secret" not in response.text
    assert client.get("/health").status_code == 200


def test_user_errors_name_their_field(client: TestClient, engine: FakeEngine) -> None:
    engine.refusal = UserError("max_tokens must be smaller")
    error = client.post("/v1/completions", json=BODY).json()["error"]
    assert error["param"] == "max_tokens"
    assert error["message"] == "max_tokens must be smaller"


def test_requests_under_way_are_bounded(engine: FakeEngine) -> None:
    state = make_state(engine, ServeConfig(max_requests=1))
    client = TestClient(build_app(state), base_url=URL)
    assert client.post("/v1/completions", json=BODY).status_code == 200
    state.num_requests = 1
    response = client.post("/v1/completions", json=BODY)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert state.num_requests == 1


def test_a_full_queue_refuses_before_anything_is_read(
    client: TestClient, engine: FakeEngine
) -> None:
    """Regression: work on bodies, templates and tokens of requests that are refused afterwards."""
    engine.room = 0
    response = client.post("/v1/chat/completions", content=b"no JSON, and no type")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"


def test_requests_on_their_way_count_as_queued(engine: FakeEngine) -> None:
    """Regression: a thousand requests at once passing the check of a queue of ten."""
    state = make_state(engine, ServeConfig())
    client = TestClient(build_app(state), base_url=URL)
    first, second = (
        RequestContext(state, cache_namespace=b""),
        RequestContext(state, cache_namespace=b""),
    )
    assert client.post("/v1/completions", json=BODY).status_code == 200
    assert engine.num_preparing == 2
    for call in (first, second, second):
        call.close()
    assert state.num_preparing == 0


@pytest.mark.parametrize(
    ("send", "status"),
    [
        (lambda c: c.get("/nothing"), 404),
        (lambda c: c.get("/v1"), 404),
        (lambda c: c.get("/v1/models/"), 404),
        (lambda c: c.get("/v1/models/other"), 404),
        (lambda c: c.post("/v1/models"), 405),
        (lambda c: c.get("/v1/completions"), 405),
        (lambda c: c.request("BREW", "/health"), 405),
        (lambda c: c.post("/v1/completions", content=b"x"), 415),
        (lambda c: c.post("/v1/completions", json={**BODY, "user": "u" * 2000}), 413),
        (lambda c: c.post("/v1/completions", json=[]), 400),
        (lambda c: c.post("/v1/completions?stream=true", json=BODY), 400),
    ],
)
def test_every_error_has_the_shape(
    make_client: MakeClient, send: Callable[[TestClient], Any], status: int
) -> None:
    response = send(make_client(max_body_bytes=1024))
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    ErrorResponse.model_validate(response.json())


def test_methods_that_would_do_are_named(client: TestClient) -> None:
    assert client.get("/v1/completions").headers["allow"] == "POST"


def test_hostile_text_comes_back_as_json(client: TestClient) -> None:
    """Regression: an answer that cannot be encoded because a request's words are in it."""
    body = json.dumps({**BODY, "\ud800": 1}).encode()
    response = client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    response = client.post("/v1/completions", json={**BODY, "model": "\u2028\x00\u202e"})
    assert response.status_code == 404
    response.json()


def test_the_server_sets_the_longest_deadline(make_client: MakeClient, engine: FakeEngine) -> None:
    client = make_client(request_seconds=1000)
    for given in ({}, {"deadline_seconds": 9900}, {"deadline_seconds": 200}):
        assert client.post("/v1/completions", json={**BODY, **given}).status_code == 200
    # What is left of them, after a moment.
    for asked, seconds in zip(engine.asked, (1000.0, 1000.0, 200.0), strict=True):
        assert asked.deadline is not None and seconds - 60.0 < asked.deadline < seconds


def test_the_model_says_whether_company_may_change_its_tokens(client: TestClient) -> None:
    """Regression: a promise that only the native kernels keep."""
    assert client.get("/v1/models").json()["data"][0]["batch_invariant"] is False


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x" * 100_000}, "prompt"),
        ("/tokenize", {"prompt": "x" * 100_000}, "prompt"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 100_000}]},
            "messages",
        ),
    ],
)
def test_a_text_beyond_any_context_is_not_even_tokenised(
    client: TestClient, path: str, body: dict[str, object], param: str
) -> None:
    """Regression: a body within its cap that takes seconds and a gigabyte to tokenise."""
    answer = client.post(path, json={"model": NAME, **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param and error["code"] == "context_length_exceeded"
