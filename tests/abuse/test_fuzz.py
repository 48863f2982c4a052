"""Schemathesis over the OpenAPI document: valid requests and invalid ones.

LOWLAT_FUZZ_EXAMPLES is the number per operation and kind: few by default, 1,000 by

    LOWLAT_FUZZ_EXAMPLES=1000 python -m pytest tests/abuse/test_fuzz.py -rP

which also prints how many of which statuses came back.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis import GenerationMode
from schemathesis.core.errors import InvalidSchema
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from lowlat.serve.routes.operations import GETS, POSTS
from tests.server.conftest import Server, serving
from tests.server.tiny_server import NAME

from .wire import call, get

EXAMPLES = int(os.environ.get("LOWLAT_FUZZ_EXAMPLES", "25"))
ENDS = ("response.completed", "response.incomplete", "response.failed", "message_stop")
ERRORS = {operation.path: operation.error for operation in (*POSTS, *GETS)}
EMBEDDINGS = ("/v1/embeddings", "/api/embed")
"""The model is no embedding model: the answer is 404."""
CANARY = {"model": NAME, "prompt": "The canary", "max_tokens": 20, "temperature": 0}
EXCLUDED = [
    positive_data_acceptance,  # fields may contradict each other
    negative_data_rejection,  # checked here: schemathesis takes 413 for an acceptance
]
OPERATIONS = [
    *((post.path, "POST", mode) for post in POSTS for mode in GenerationMode),
    *((o.path, o.method.upper(), GenerationMode.POSITIVE) for o in GETS),
    # The others take nothing that could be wrong: any text may be the id of a response.
    *(
        (o.path, o.method.upper(), GenerationMode.NEGATIVE)
        for o in GETS
        if o.parameter is not None and o.path != "/v1/responses/{id}"
    ),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A small context: answers are short, and prompts reach its end."""
    with serving("--context", "96") as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    return json.loads(get(server.port, "/openapi.json").body)


def test_every_operation_is_fuzzed(document: dict[str, Any]) -> None:
    described = {
        (path, method.upper())
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert described == {(path, method) for path, method, _ in OPERATIONS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "method", "mode"), OPERATIONS, ids=[f"{m} {p} {k.value}" for p, m, k in OPERATIONS]
)
def test_answers_keep_to_the_document(
    server: Server, document: dict[str, Any], path: str, method: str, mode: GenerationMode
) -> None:
    """No 5xx, known statuses, matching answers, one shape for errors, and no after-effects.

    What does not keep to the document is refused.
    """
    # No generated name is that of a stored response.
    has_none = path.startswith("/v1/responses/")
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.config.generation.update(modes=[mode], max_examples=EXAMPLES)
    schema.config.max_stream_events = 100_000
    operation = schema[path][method]
    before = call(server.port, "/v1/completions", CANARY)
    statuses = run(operation, mode, events_of(document, path, method))
    print(f"{method} {path}, {mode.value}: {statuses.total()} requests, {dict(statuses)}")
    after = call(server.port, "/v1/completions", CANARY)
    assert before.status == after.status == 200
    assert json.loads(before.body)["choices"] == json.loads(after.body)["choices"]
    assert get(server.port, "/health").status == 200
    # What /api/show takes is soon exhausted.
    assert statuses.total() >= (EXAMPLES if method == "POST" and path != "/api/show" else 1)
    if not mode.is_negative and not has_none:
        # Fields that are right one by one may contradict each other; most must not.
        answered = statuses[404 if path in EMBEDDINGS else 200]
        assert answered >= max(1, statuses.total() // 20), statuses


def events_of(document: dict[str, Any], path: str, method: str) -> Any:
    """A validator of the data of a stream's events; None where there are no streams."""
    content = document["paths"][path][method.lower()]["responses"]["200"]["content"]
    if "text/event-stream" not in content:
        return None
    schema = content["text/event-stream"]["schema"]["properties"]["data"]["anyOf"][0][
        "contentSchema"
    ]
    whole = {**schema, "components": document["components"]}
    return jsonschema_rs.Draft202012Validator(whole)


def run(operation: APIOperation, mode: GenerationMode, events: Any) -> Counter[int]:
    """Send EXAMPLES requests and check every answer; returns how often which status came."""
    statuses: Counter[int] = Counter()
    cases = operation.as_strategy(generation_mode=mode)

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],  # pyright: ignore[reportArgumentType]
    )
    @hypothesis.given(data=strategies.data())
    def check(data: strategies.DataObject) -> None:
        try:
            case = data.draw(cases)
        except InvalidSchema:
            hypothesis.reject()  # a schema of schemathesis's making that it has no values for
        response = case.call(timeout=60)
        statuses[response.status_code] += 1
        assert response.status_code < 500
        if response.status_code >= 400:
            ERRORS[operation.path].model_validate(json.loads(response.content))
        elif mode.is_negative:
            raise AssertionError(f"wrong data was accepted: {case.body!r}")
        elif response.headers["content-type"][0].startswith("text/event-stream"):
            check_stream(response.content.decode(), events, ERRORS[operation.path])
        case.validate_response(response, excluded_checks=EXCLUDED)

    check()
    return statuses


def check_stream(text: str, events: Any, error: Any) -> None:
    """Every event's data matches the document, and the stream has come to its end."""
    # Events end their lines with \n alone; splitlines would split at more.
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    values = [json.loads(item) for item in data if item != "[DONE]"]
    if "error" in values[-1]:
        # The deadline passed.
        assert error.model_validate(values.pop()).error.code == "deadline_exceeded"
    else:
        assert data[-1] == "[DONE]" or values[-1]["type"] in ENDS
    for value in values:
        events.validate(value)
