"""An application over the fake bridge, and a client that calls it in this process."""

from collections.abc import Callable, Iterator

import pytest
from starlette.testclient import TestClient

from lowlat.serve.app import build_app, make_state
from lowlat.serve.config import ServeConfig

from .fake_bridge import FakeBridge

URL = "http://127.0.0.1:8000"
MakeClient = Callable[..., TestClient]


@pytest.fixture(scope="session")
def shared_bridge() -> FakeBridge:
    return FakeBridge()


@pytest.fixture
def bridge(shared_bridge: FakeBridge) -> FakeBridge:
    """A bridge of its own for each test; the model is made once."""
    return FakeBridge(model=shared_bridge.model)


@pytest.fixture
def make_client(bridge: FakeBridge) -> Iterator[MakeClient]:
    """`make_client(**options of ServeConfig)`: a client of a new application."""
    state = []

    def make(**options: object) -> TestClient:
        config = ServeConfig(**options)  # pyright: ignore[reportArgumentType]
        state.append(make_state(bridge, config))
        app = build_app(state[-1])
        return TestClient(app, base_url=URL, raise_server_exceptions=False)

    yield make
    for made in state:
        made.close()


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client()
