"""The OpenAPI document matches the application."""

import json
from typing import Any

import jsonschema_rs
import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from lowlat.serve.app import build_app, make_state
from lowlat.serve.config import ServeConfig

from .conftest import MakeClient
from .fake_engine import NAME, FakeEngine

EXAMPLES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
    "/api/chat": {"messages": [{"role": "user", "content": "Hi"}], "stream": False},
    "/api/generate": {"prompt": "Hi", "stream": False},
    "/api/show": {},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72, 105]},
}


def document_of(client: TestClient, **headers: str) -> dict[str, Any]:
    return client.get("/openapi.json", headers=headers).json()


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    whole = {**schema, "components": document["components"]}
    return jsonschema_rs.Draft202012Validator(whole)


def test_every_api_route_is_described(client: TestClient, engine: FakeEngine) -> None:
    described = {
        (method.upper(), path)
        for path, operations in document_of(client)["paths"].items()
        for method in operations
    }
    app = build_app(make_state(engine, ServeConfig()))
    routes = {
        (method, route.path.replace(":path", ""))
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    pages = {("GET", "/"), ("GET", "/openapi.json")}
    assert described == {pair for pair in routes if "/static/" not in pair[1]} - pages


def test_every_operation_may_refuse_long_headers(client: TestClient) -> None:
    for operations in document_of(client)["paths"].values():
        assert all("431" in operation["responses"] for operation in operations.values())


def test_examples_cover_all_bodies(client: TestClient) -> None:
    paths = document_of(client)["paths"]
    posts = {path for path in paths if "post" in paths[path]}
    assert posts == {*EXAMPLES, "/v1/embeddings", "/api/embed"}


@pytest.mark.parametrize("path", EXAMPLES)
def test_requests_and_responses_match_the_document(client: TestClient, path: str) -> None:
    document = document_of(client)
    operation = document["paths"][path]["post"]
    body = {"model": NAME, **EXAMPLES[path]}
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    takes = validator(document, schema)
    assert takes.is_valid(body)
    for wrong in ({}, {**body, "unknown": 1}, {**body, "model": "other"}):
        assert not takes.is_valid(wrong)
        response = client.post(path, json=wrong)
        assert 400 <= response.status_code < 500
        told = operation["responses"][str(response.status_code)]["content"]["application/json"]
        assert validator(document, told["schema"]).is_valid(response.json())
    response = client.post(path, json=body)
    assert response.status_code == 200
    told = operation["responses"]["200"]["content"]["application/json"]
    validator(document, told["schema"]).validate(response.json())


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/v1/models/{id}",
        "/health",
        "/ready",
        "/api/tags",
        "/api/ps",
        "/api/version",
    ],
)
def test_descriptions_of_what_is_read(client: TestClient, path: str) -> None:
    document = document_of(client)
    operation = document["paths"][path]["get"]
    answer = client.get(path.replace("{id}", NAME)).json()
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    validator(document, schema).validate(answer)


def test_keys_are_described_where_they_are_needed(make_client: MakeClient) -> None:
    assert "securitySchemes" not in document_of(make_client())["components"]
    key = "k" * 32
    document = document_of(make_client(api_keys=(key,)), Authorization=f"Bearer {key}")
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]
    assert key not in json.dumps(document)
