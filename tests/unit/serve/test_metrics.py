"""GET /metrics and the logs: names, values, and what must not appear in them."""

import hashlib
import io
import json
import logging
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from lowlat.serve.http.logs import LOGGER, REQUEST_ID, JsonFormatter, choose_request_id, log

from .conftest import MakeClient
from .fake_engine import NAME, FakeEngine

BODY = {"model": NAME, "prompt": "a secret prompt"}
KEY = "k" * 32
MODEL = ("model_name", NAME)


def samples(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_engine_figures(client: TestClient) -> None:
    found = samples(client)
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.2,
        "prompt_tokens_total": 100,
        "generation_tokens_total": 70,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 40,
        "spec_decode_num_draft_tokens_total": 20,
        "spec_decode_num_accepted_tokens_total": 15,
        "num_preemptions_total": 1,
        "prefix_cache_disk_hits_total": 64,
        "prefix_cache_disk_read_bytes_total": 900,
        "prefix_cache_disk_written_bytes_total": 800,
        "prefix_cache_disk_evicted_bytes_total": 700,
    }
    for name, value in expected.items():
        assert found[f"lowlat:{name}", (MODEL,)] == value
    assert found["lowlat:request_success_total", (("finished_reason", "stop"), MODEL)] == 4
    assert found["lowlat:request_success_total", (("finished_reason", "abort"), MODEL)] == 0
    loads = "lowlat:expert_tokens_total"
    labels = [(("expert", str(number)), ("layer", "3"), MODEL) for number in range(3)]
    assert [found[loads, each] for each in labels] == [5, 0, 8]
    dropped = "lowlat:prefix_cache_disk_dropped_total"
    assert found[dropped, (MODEL, ("reason", "corrupt"))] == 2
    assert found[dropped, (MODEL, ("reason", "disk_full"))] == 0
    ttft = "lowlat:time_to_first_token_seconds"
    assert found[f"{ttft}_sum", (MODEL,)] == 3.5
    assert found[f"{ttft}_count", (MODEL,)] == 4
    buckets = [found[f"{ttft}_bucket", (("le", bound), MODEL)] for bound in ("0.1", "1.0", "+Inf")]
    assert buckets == [2, 3, 4]


def test_http_figures(client: TestClient) -> None:
    client.post("/v1/completions", json=BODY)
    client.post("/v1/completions", json={})
    found = samples(client)

    def count(route: str, method: str, status: str) -> float:
        labels = (("method", method), ("route", route), ("status", status))
        return found["lowlat:http_requests_total", labels]

    assert count("/v1/completions", "POST", "200") == 1
    assert count("/v1/completions", "POST", "400") == 1
    assert found["lowlat:http_request_duration_seconds_count", (("route", "/v1/completions"),)] == 2


def test_clients_cannot_make_labels(client: TestClient) -> None:
    """Regression: unbounded label cardinality from made-up paths and methods."""
    for number in range(20):
        client.get(f"/path{number}")
        client.request(f"METHOD{number}", "/health")
    text = client.get("/metrics").text
    assert "path" not in text.replace("path's", "")
    assert "METHOD" not in text


def test_request_ids(client: TestClient) -> None:
    given = client.get("/health", headers={"X-Request-Id": "my-id_1.2"})
    assert given.headers["x-request-id"] == "my-id_1.2"
    for bad in ("", "a b", "x" * 200, "a\\n", "ü".encode().decode("latin-1")):
        own = choose_request_id(bad)
        assert own.startswith("req-") and len(own) == 36
    first, second = (client.get("/nothing").headers["x-request-id"] for _ in range(2))
    assert first != second


@pytest.fixture
def lines() -> io.StringIO:
    """What the server logs during the test."""
    return io.StringIO()


@pytest.fixture(autouse=True)
def captured(lines: io.StringIO, request: pytest.FixtureRequest) -> None:
    handler = logging.StreamHandler(lines)
    handler.setFormatter(JsonFormatter())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    request.addfinalizer(lambda: LOGGER.setLevel(logging.NOTSET))
    request.addfinalizer(lambda: LOGGER.removeHandler(handler))


CHAT = {"messages": [{"role": "user", "content": "a secret prompt"}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a secret prompt"}),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"input": "a secret prompt"}),
        ("/v1/messages", {**CHAT, "max_tokens": 9}),
        ("/api/chat", CHAT),
        ("/api/generate", {"prompt": "a secret prompt"}),
    ],
)
def test_each_request_is_one_line_of_json(
    client: TestClient,
    engine: FakeEngine,
    lines: io.StringIO,
    path: str,
    body: dict[str, Any],
    stream: bool,
) -> None:
    body = {"model": NAME, "stream": stream, **body}
    client.post(f"{path}?", json=body, headers={"X-Request-Id": "abc"})
    (line,) = map(json.loads, lines.getvalue().splitlines())
    assert line["message"] == "request"
    assert (line["request_id"], line["method"]) == ("abc", "POST")
    assert (line["path"], line["status"]) == (path, 200)
    assert line["seconds"] >= 0
    assert line["level"] == "info"
    assert (line["client"], line["key"], line["model"]) == ("testclient", None, NAME)
    counts = {name: line[name] for name in line if name.endswith("_tokens")}
    tokens = len(engine.asked[0].prompt)
    assert tokens >= 15
    assert counts == {"prompt_tokens": tokens, "cached_tokens": 3, "completion_tokens": 5}
    assert (line["prefill_seconds"], line["decode_seconds"]) == (0.25, 0.5)


def test_lines_have_a_fingerprint_of_the_key(make_client: MakeClient, lines: io.StringIO) -> None:
    keys = ("a" * 20, "b" * 20)
    client = make_client(api_keys=keys)
    for key in (*keys, "wrong"):
        client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    logged = [json.loads(line)["key"] for line in lines.getvalue().splitlines()]
    assert logged == [*(hashlib.sha256(key.encode()).hexdigest()[:8] for key in keys), None]
    assert not any(key in lines.getvalue() for key in keys)


def test_errors_are_logged_with_traceback(
    client: TestClient, engine: FakeEngine, lines: io.StringIO
) -> None:
    engine.refusal = RuntimeError("the cause")
    client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "abc"})
    fault, request = map(json.loads, lines.getvalue().splitlines())
    assert fault["request_id"] == request["request_id"] == "abc"
    assert "RuntimeError: the cause" in fault["traceback"]
    assert request["status"] == 500


def test_secrets_are_not_logged(
    make_client: MakeClient, engine: FakeEngine, lines: io.StringIO
) -> None:
    """Regression: prompts, answers, keys or query strings in a log."""
    client = make_client(api_keys=(KEY,))
    headers = {"Authorization": f"Bearer {KEY}"}
    client.post("/v1/completions", json=BODY, headers=headers)
    client.post(f"/v1/completions?key={KEY}", json=BODY, headers=headers)
    client.post("/login", data={"key": KEY}, follow_redirects=False)
    engine.refusal = RuntimeError("x")
    client.post("/v1/completions", json=BODY, headers=headers)
    text = lines.getvalue()
    assert text.count("\n") == 5
    for secret in (KEY, "secret", "Hello"):
        assert secret not in text


def test_lines_stay_lines(lines: io.StringIO) -> None:
    """Regression: a client writing lines of its own into the log."""
    token = REQUEST_ID.set("abc")
    log(logging.WARNING, "a\nb", path="/x\n\u2028y")
    REQUEST_ID.reset(token)
    (line,) = lines.getvalue().splitlines()
    assert json.loads(line)["path"] == "/x\n\u2028y"
