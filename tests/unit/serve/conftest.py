"""Fixtures: an application over the fake engine, and a client that calls it in this process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from starlette.testclient import TestClient

from lowlat.serve.app import build_app, make_state
from lowlat.serve.config import ServeConfig

from .fake_engine import FakeEngine

URL = "http://127.0.0.1:8000"
MakeClient = Callable[..., TestClient]


@pytest.fixture(scope="session")
def shared_engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def engine(shared_engine: FakeEngine) -> FakeEngine:
    """A engine of its own for each test; the model is made once."""
    return FakeEngine(model=shared_engine.model)


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    """An event loop for all requests, each of which would start one of its own."""
    with start_blocking_portal() as running:
        yield running


@pytest.fixture
def make_client(engine: FakeEngine, portal: BlockingPortal) -> Iterator[MakeClient]:
    """`make_client(**options of ServeConfig)`: a client of a new application."""
    state = []

    def make(**options: object) -> TestClient:
        config = ServeConfig(**options)  # pyright: ignore[reportArgumentType]
        state.append(make_state(engine, config))
        app = build_app(state[-1])
        client = TestClient(app, base_url=URL, raise_server_exceptions=False)
        client.portal = portal
        return client

    yield make
    for made in state:
        made.close()


def assert_refused(
    client: TestClient, engine: FakeEngine, path: str, body: dict[str, Any], param: str
) -> None:
    """A request is answered 400, naming the field `param`, before the engine has it."""
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.asked == []


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client()
