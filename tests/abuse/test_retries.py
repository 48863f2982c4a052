"""The openai client retries after 429 and 503: how long it waits, and that it succeeds."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from lowlat.engine.request import TokenEvent
from lowlat.serve.generation import Draining, Overloaded
from lowlat.serve.http.errors import RETRY_SECONDS

from .local import NAME, Local, counting_model, listening, successors, until
from .wire import SECONDS


@pytest.fixture(scope="module")
def server() -> Iterator[Local]:
    with listening() as running:
        yield running


@pytest.mark.parametrize(
    ("refusals", "waits"),
    [
        ([Overloaded(3)], [3]),
        ([Draining()], [RETRY_SECONDS]),
        ([Overloaded(1), Draining()], [1, RETRY_SECONDS]),
    ],
    ids=["429", "503", "both"],
)
def test_refused_requests_are_sent_again(
    server: Local,
    refusals: list[Exception],
    waits: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coming, waited = list(refusals), []

    def refuse(*args: object) -> None:
        if coming:
            raise coming.pop(0)

    monkeypatch.setattr(type(server.state), "check_capacity", refuse)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
        wait_of = client._calculate_retry_timeout

        def at_once(*args: object) -> float:
            waited.append(wait_of(*args))  # pyright: ignore[reportArgumentType]
            return 0.0

        monkeypatch.setattr(client, "_calculate_retry_timeout", at_once)
        answer = client.completions.create(model=NAME, prompt="abc", max_tokens=3, temperature=0)
    assert answer.choices[0].text == successors("abc", 3)
    assert waited == waits and not coming


def test_a_request_that_a_full_queue_refused_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine stands still until the client waits for its retry."""
    model, is_held, may_step = counting_model(), threading.Event(), threading.Event()
    step = model.engine.step

    def held() -> list[TokenEvent]:
        is_held.set()
        assert may_step.wait(SECONDS)
        return step()

    monkeypatch.setattr(model.engine, "step", held)
    with listening(model, max_queue=1) as server, ThreadPoolExecutor(1) as pool:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
            wait_of = client._calculate_retry_timeout
            waited: list[float] = []

            def until_idle(*args: object) -> float:
                waited.append(wait_of(*args))  # pyright: ignore[reportArgumentType]
                may_step.set()
                until(lambda: server.is_idle, "the end of the first")
                return 0.0

            def complete(prompt: str) -> str:
                answer = client.completions.create(
                    model=NAME, prompt=prompt, max_tokens=3, temperature=0
                )
                return answer.choices[0].text

            first = pool.submit(complete, "abc")
            assert is_held.wait(SECONDS)
            monkeypatch.setattr(client, "_calculate_retry_timeout", until_idle)
            assert complete("xyz") == successors("xyz", 3)
        assert first.result() == successors("abc", 3)
    assert len(waited) == 1 and waited[0] >= 1


def test_a_missed_deadline_is_not_sent_again(server: Local) -> None:
    """It would be missed again."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(
                model=NAME, prompt="abc", extra_body={"deadline_seconds": 1e-9}
            )
    assert caught.value.status_code == 408
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"
