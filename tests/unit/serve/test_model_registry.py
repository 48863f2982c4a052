"""Several models in one server: loading on demand, names, waiting, failures, metrics."""

import asyncio
from typing import Any

import pytest

from lowlat.generate.model import Model
from lowlat.serve import model_registry, served_model
from lowlat.serve.served_model import LoadedModel
from lowlat.utils.errors import UserError

from .engine_use import before_each_step
from .on_demand import (
    BYTES,
    Background,
    complete,
    error_of,
    gauge,
    holding,
    one,
    serving,
    states,
    text_of,
    two,
    until,
)


def test_models_are_loaded_by_their_first_request() -> None:
    a, b = one(), two()
    with serving(a, b) as (client, _):
        assert client.get("/ready").status_code == 200
        assert states(client) == {"one": "unloaded", "two": "unloaded"}
        assert text_of(complete(client, "one")) == "bcd"
        assert states(client) == {"one": "ready", "two": "unloaded"}
        assert text_of(complete(client, "two")) == "ceg"
        assert text_of(complete(client, "one")) == "bcd"
        assert states(client) == {"one": "ready", "two": "ready"}
        assert (a.num_attempts, b.num_attempts) == (1, 1)
        assert gauge(client, "model_loads_total", "one") == 1
        assert gauge(client, "model_memory_bytes", "two") == BYTES
        assert gauge(client, "generation_tokens_total", "one") == 6
        assert gauge(client, "generation_tokens_total", "two") == 3
        assert gauge(client, "model_state", "one", state="ready") == 1
        assert gauge(client, "model_state", "one", state="failed") == 0


def test_a_model_is_described_before_it_is_loaded() -> None:
    with serving(one(aliases=("first", "gpt")), two()) as (client, _):
        before = client.get("/v1/models/gpt").json()
        assert (before["id"], before["aliases"]) == ("one", ["first", "gpt"])
        assert (before["max_model_len"], before["has_chat_template"]) == (512, True)
        assert before["cache_dtype"] is None
        shown = client.post("/api/show", json={"model": "two"}).json()
        assert shown["template"] and shown["details"]["quantization_level"] == ""
        tags = client.get("/api/tags").json()["models"]
        assert [tag["name"] for tag in tags] == ["one", "two"]
        assert client.get("/api/ps").json()["models"] == []
        assert set(states(client).values()) == {"unloaded"}
        text_of(complete(client, "gpt"))
        assert [model["name"] for model in client.get("/api/ps").json()["models"]] == ["one"]
        assert client.get("/v1/models/one").json()["cache_dtype"] == "fp32"


def test_an_alias_is_the_same_model() -> None:
    a = one(aliases=("gpt",))
    with serving(a, two()) as (client, _):
        answer = complete(client, "gpt")
        assert text_of(answer) == "bcd" and answer.json()["model"] == "gpt"
        assert text_of(complete(client, "one")) == "bcd"
        assert a.num_attempts == 1


def test_an_unknown_model_is_a_404_that_names_the_known_ones() -> None:
    with serving(one(), two()) as (client, _):
        message = error_of(complete(client, "none"), 404, "model_not_found")
        assert "'one'" in message and "'two'" in message
        assert client.get("/v1/models/none").status_code == 404


CHAT = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 2}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
        ("/v1/messages", {**CHAT, "max_tokens": 2}),
        ("/v1/messages/count_tokens", CHAT),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [97]}),
        ("/api/chat", {**CHAT, "stream": False, "options": {"num_predict": 2}}),
        ("/api/generate", {"prompt": "a", "stream": False, "options": {"num_predict": 2}}),
    ],
)
def test_every_route_has_the_model_of_its_request(path: str, body: dict[str, Any]) -> None:
    a, b = one(), two()
    with serving(a, b) as (client, _):
        response = client.post(path, json={"model": "two", **body})
        assert response.status_code == 200, response.text
        assert (a.num_attempts, b.num_attempts) == (0, 1)
        assert states(client) == {"one": "unloaded", "two": "ready"}


def test_embeddings_have_the_model_of_their_request() -> None:
    with serving(one(), two()) as (client, _):
        body = {"model": "two", "input": "a"}
        message = error_of(client.post("/v1/embeddings", json=body), 404, "not_an_embedding_model")
        assert "'two'" in message


def test_stored_responses_keep_their_model() -> None:
    with serving(one(), two()) as (client, _):
        body = {"model": "one", "input": "a", "max_output_tokens": 2}
        first = client.post("/v1/responses", json=body).json()
        body |= {"model": "two", "previous_response_id": first["id"]}
        second = client.post("/v1/responses", json=body).json()
        for response, model in ((first, "one"), (second, "two")):
            stored = client.get(f"/v1/responses/{response['id']}").json()
            assert stored == response and stored["model"] == model


def test_concurrent_requests_share_a_load() -> None:
    a = one()
    a.may_go.clear()
    with serving(a, two()) as (client, _):
        waiting = [Background(lambda: complete(client, "one")) for _ in range(5)]
        until(lambda: a.served.num_requests == 5 and a.num_attempts)
        assert states(client)["one"] == "loading"
        assert gauge(client, "model_load_progress", "one") == 0.75
        assert gauge(client, "num_requests_loading", "one") == 5
        # The others serve meanwhile.
        assert text_of(complete(client, "two")) == "ceg"
        a.may_go.set()
        assert [text_of(request.result()) for request in waiting] == ["bcd"] * 5
        assert a.num_attempts == 1
        assert gauge(client, "model_load_progress", "one") == 1


def test_the_wait_for_a_model_is_bounded() -> None:
    a = one()
    a.may_go.clear()
    with serving(a, two(), load_seconds=0.05) as (client, _):
        for _ in range(2):
            response = complete(client, "one")
            message = error_of(response, 503, "model_loading")
            assert "reading weights, 75 %" in message
            assert int(response.headers["retry-after"]) > 0
        a.may_go.set()
        until(lambda: states(client)["one"] == "ready")
        assert text_of(complete(client, "one")) == "bcd"
        assert a.num_attempts == 1


def test_a_deadline_holds_while_a_model_loads() -> None:
    a = one()
    a.may_go.clear()
    with serving(a, two()) as (client, _):
        response = complete(client, "one", deadline_seconds=0.05)
        error_of(response, 408, "deadline_exceeded")
        assert a.served.num_requests == a.served.num_preparing == 0


def test_the_queue_of_a_loading_model_is_bounded() -> None:
    a = one(max_queue=2)
    a.may_go.clear()
    with serving(a, two()) as (client, state):
        waiting = [Background(lambda: complete(client, "one")) for _ in range(2)]
        until(lambda: a.served.num_preparing == 2)
        error_of(complete(client, "one"), 429, "overloaded")
        assert text_of(complete(client, "two")) == "ceg"
        a.may_go.set()
        assert [text_of(request.result()) for request in waiting] == ["bcd"] * 2
        assert state.num_preparing == a.served.num_preparing == a.served.num_requests == 0


def test_a_server_with_every_queue_full_refuses_before_the_body() -> None:
    a, b = one(max_queue=1), two(max_queue=1)
    for loader in (a, b):
        loader.may_go.clear()
    with serving(a, b) as (client, _):
        waiting = [Background(lambda m=m: complete(client, m)) for m in ("one", "two")]
        until(lambda: a.served.num_preparing and b.served.num_preparing)
        response = client.post("/v1/completions", content=b"no JSON, and no type")
        error_of(response, 429, "overloaded")
        a.may_go.set()
        b.may_go.set()
        assert [text_of(request.result()) for request in waiting] == ["bcd", "ceg"]


def test_a_load_begins_without_the_progress_of_the_last() -> None:
    a, b = one(), two()
    with serving(a, b, memory_bytes=BYTES) as (client, _):
        text_of(complete(client, "one"))
        text_of(complete(client, "two"))
        began, may_end = holding(b)
        running = Background(lambda: complete(client, "two"))
        until(began.is_set)
        waiting = Background(lambda: complete(client, "one"))
        until(lambda: states(client)["one"] == "loading")
        assert gauge(client, "model_load_progress", "one") == 0
        may_end.set()
        assert text_of(running.result()) == "ceg" and text_of(waiting.result()) == "bcd"


def test_a_model_that_fails_to_load_leaves_the_others() -> None:
    a = one()
    a.error = UserError("/private/folder/config.json: is broken")
    with serving(a, two()) as (client, _):
        for attempts in (1, 2):
            message = error_of(complete(client, "one"), 503, "model_failed")
            assert "private" not in message and "'one'" in message
            assert a.num_attempts == attempts
        # The third attempt has to wait.
        response = complete(client, "one")
        error_of(response, 503, "model_failed")
        assert int(response.headers["retry-after"]) > 0
        assert a.num_attempts == 2
        assert states(client) == {"one": "failed", "two": "unloaded"}
        assert text_of(complete(client, "two")) == "ceg"
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert gauge(client, "model_load_failures_total", "one") == 2
        assert gauge(client, "model_memory_bytes", "one") == 0
        a.error, a.served._retry_at = None, 0.0
        assert text_of(complete(client, "one")) == "bcd"
        assert states(client)["one"] == "ready"


def test_the_time_between_attempts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_model.time, "monotonic", lambda: 1000.0)
    a = one()
    a.error = RuntimeError("broken")
    waits = []
    for _ in range(12):
        a.served.fail("broken")
        waits.append(a.served._retry_at - 1000.0)
    assert waits[:4] == [0, 1, 3, 7] and waits[-1] == 300


def crash(model: Model) -> None:
    """End the model's engine with its next step."""

    def end() -> None:
        raise AssertionError("a page is lost")

    before_each_step(model, end)


def test_a_crashed_engine_is_loaded_again() -> None:
    a, b = one(), two()
    with serving(a, b) as (client, _):
        text_of(complete(client, "one"))
        text_of(complete(client, "two"))
        crash(a.models[-1])
        assert complete(client, "one").status_code == 500
        assert states(client) == {"one": "failed", "two": "ready"}
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert text_of(complete(client, "two")) == "ceg"
        assert text_of(complete(client, "one")) == "bcd"
        assert states(client) == {"one": "ready", "two": "ready"}
        assert (a.num_attempts, b.num_attempts) == (2, 1)
        assert gauge(client, "model_crashes_total", "one") == 1
        # A second crash soon after is not repaired at once.
        crash(a.models[-1])
        assert complete(client, "one").status_code == 500
        error_of(complete(client, "one"), 503, "model_failed")
        assert a.num_attempts == 2
        assert text_of(complete(client, "two")) == "ceg"


def test_a_crash_counts_also_if_the_model_is_unloaded_first() -> None:
    a = one()
    with serving(a, two(), memory_bytes=BYTES) as (client, _):
        for number in (1, 2):
            text_of(complete(client, "one"))
            crash(a.models[-1])
            assert complete(client, "one").status_code == 500
            text_of(complete(client, "two"))
            assert states(client)["one"] == "failed"
            assert gauge(client, "model_crashes_total", "one") == number
        # A second crash soon after is not repaired at once.
        assert a.served._retry_at > a.served._failed_at


def test_a_hanging_engine_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    a = one()
    with serving(a, two()) as (client, _):
        text_of(complete(client, "one"))
        monkeypatch.setattr(type(a.served.loaded.engine), "is_healthy", False)
        assert states(client)["one"] == "failed"
        assert client.get("/health").status_code == 200
        assert text_of(complete(client, "two")) == "ceg"


def test_the_server_ends_while_a_model_loads() -> None:
    a = one()
    a.may_go.clear()
    with serving(a, two()) as (client, state):
        waiting = Background(lambda: complete(client, "one"))
        until(lambda: a.num_attempts)
        assert client.portal is not None
        client.portal.call(state.models.drain, 0.0)
        error_of(waiting.result(), 503, "shutting_down")
        error_of(complete(client, "one"), 503, "shutting_down")


def test_the_server_ends_while_an_unloading_engine_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(loaded: LoadedModel) -> None:
        await loaded.engine.drain(0.0)
        loaded.close()
        await asyncio.Event().wait()

    monkeypatch.setattr(model_registry, "_unload", hang)
    monkeypatch.setattr(model_registry, "JOIN_SECONDS", 0.05)
    with serving(one(), two(), unload_seconds=0.05) as (client, state):
        text_of(complete(client, "one"))
        until(lambda: states(client)["one"] == "unloading")
        assert client.portal is not None
        client.portal.call(state.models.drain, 0.0)
        error_of(complete(client, "two"), 503, "shutting_down")
