"""Schemathesis over the published OpenAPI document: requests that match it, and ones that do not.

LOWLAT_SCHEMA_EXAMPLES sets how many are made per operation and kind.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import positive_data_acceptance

from lowlat.serve.protocol.models import ErrorResponse

from .conftest import Server, serving
from .tiny_server import NAME

EXAMPLES = int(os.environ.get("LOWLAT_SCHEMA_EXAMPLES", "25"))
CANARY = {"model": NAME, "prompt": "The canary", "max_tokens": 20, "temperature": 0}
OPERATIONS = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A small context: answers are short, and prompts reach its end."""
    with serving("--context", "96") as running:
        yield running


def canary(server: Server) -> str:
    response = httpx.post(f"{server.url}/v1/completions", json=CANARY, timeout=60)
    return response.json()["choices"][0]["text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (method, path, mode)
        for method, path in OPERATIONS
        for mode in GenerationMode
        # A request that holds nothing cannot be wrong.
        if method == "POST" or not mode.is_negative
    ],
)
def test_answers_keep_to_the_document(
    server: Server, method: str, path: str, mode: GenerationMode
) -> None:
    """No 5xx, known statuses, matching answers, one shape for errors, and no after-effects."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.config.generation.update(modes=[mode], max_examples=EXAMPLES)
    operation = schema[path][method]
    before = canary(server)
    run(server, operation, mode)
    assert canary(server) == before
    assert httpx.get(f"{server.url}/health").status_code == 200


def run(server: Server, operation: APIOperation, mode: GenerationMode) -> None:
    """Send EXAMPLES requests and check every answer."""
    statuses: Counter[int] = Counter()

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        response = case.call(timeout=60)
        statuses[response.status_code] += 1
        assert response.status_code < 500
        if response.status_code >= 400:
            ErrorResponse.model_validate(json.loads(response.content))
        elif mode.is_negative:
            raise AssertionError(f"wrong data was accepted: {case.body!r}")
        # Fields that are right one by one may contradict each other, which is a 400.
        case.validate_response(response, excluded_checks=[positive_data_acceptance])

    check()
    if not mode.is_negative:
        assert statuses[200] >= max(1, statuses.total() // 20), statuses
