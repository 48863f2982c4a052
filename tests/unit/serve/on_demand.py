"""Models that a server loads on demand, made in memory; tests can hold or fail loading."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from lowlat.generate.model import Model
from lowlat.serve import model_registry
from lowlat.serve.app import build_app, make_state
from lowlat.serve.config import ServeConfig
from lowlat.serve.model_info import ModelInfo
from lowlat.serve.served_model import PreparedModel, ServedModel
from lowlat.serve.state import ServerState
from lowlat.utils.progress import Progress
from tests.fakes import ScriptedModel, byte_tokenizer, gqa_config

from .engine_use import before_each_step

URL = "http://127.0.0.1:8000"
SECONDS = 60.0
BYTES = 1000
"""Memory that is counted for a model, unless a test says otherwise."""


def stepping_model(step: int) -> Model:
    """After any byte comes the one `step` further, from the alphabet's start again after its
    end."""

    def successor(token: int) -> int:
        return ord("a") if token + step > ord("z") else token + step

    config = gqa_config(max_position_embeddings=512)
    return Model(ScriptedModel(config, successor), byte_tokenizer(), name="loaded")


class Loader:
    """Loads `make()` under `name`; records the models, may hold or fail."""

    def __init__(self, name: str, make: Callable[[], Model], **options: Any) -> None:
        self.models: list[Model] = []
        self.num_attempts = 0
        self.error: Exception | None = None
        self.may_go = threading.Event()
        self.may_go.set()
        self._make = make
        first = make()
        info = ModelInfo.of_files(
            first.config,
            first.tokenizer,
            context=first.context,
            weights_bytes=BYTES,
            pooling=None,
        )
        prepared = PreparedModel(info=info, num_bytes=BYTES, load=self._load)
        self.served = ServedModel(
            name=name, prepare=lambda _: prepared, prepared=prepared, info=info, **options
        )

    def _load(self, progress: Progress) -> Model:
        self.num_attempts += 1
        with progress.task("reading weights", 4) as task:
            task.advance(3)
            assert self.may_go.wait(SECONDS)
        if self.error is not None:
            raise self.error
        self.models.append(self._make())
        return self.models[-1]


def one(**options: Any) -> Loader:
    return Loader("one", lambda: stepping_model(1), **options)


def two(**options: Any) -> Loader:
    return Loader("two", lambda: stepping_model(2), **options)


def three() -> Loader:
    return Loader("three", lambda: stepping_model(3))


@contextlib.contextmanager
def serving(*loaders: Loader, **options: Any) -> Iterator[tuple[TestClient, ServerState]]:
    """A running application of the loaders' models, each counted as BYTES; `options` of
    ServeConfig."""
    state = make_state([loader.served for loader in loaders], ServeConfig(**options))
    try:
        with (
            patch.object(model_registry, "num_bytes_of", lambda _: BYTES),
            TestClient(build_app(state), base_url=URL) as client,
        ):
            yield client, state
    finally:
        for loader in loaders:
            loader.may_go.set()


def complete(client: TestClient, model: str, prompt: str = "a", **options: Any) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": 3, "temperature": 0.0, **options}
    return client.post("/v1/completions", json=body)


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def error_of(response: Any, status: int, code: str) -> str:
    """The message of an error."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    return error["message"]


def states(client: TestClient) -> dict[str, str]:
    return {card["id"]: card["state"] for card in client.get("/v1/models").json()["data"]}


def until(condition: Callable[[], Any]) -> None:
    """Wait for what must come."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


class Background:
    """A request in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._result: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._result.append(call()))
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(SECONDS)
        (result,) = self._result
        return result


def gauge(client: TestClient, name: str, model: str, **labels: str) -> float:
    wanted = {"model_name": model, **labels}
    (value,) = [
        sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == f"lowlat:{name}" and sample.labels == wanted
    ]
    return value


def holding(loader: Loader) -> tuple[threading.Event, threading.Event]:
    """Events of the model in memory: a step has begun; it may end."""
    began, may_end = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        may_end.wait(60.0)

    before_each_step(loader.models[-1], wait)
    return began, may_end
