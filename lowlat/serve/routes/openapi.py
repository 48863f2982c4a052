"""GET /openapi.json: the API as an OpenAPI 3.1 document, generated from the pydantic models.

The document is exact: the server rejects what it forbids, and accepts what it allows unless fields
contradict each other.
"""

import functools
import json
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lowlat.serve.http.security import OPEN_PATHS
from lowlat.serve.protocol.base import TokenId
from lowlat.serve.protocol.errors import ErrorResponse
from lowlat.serve.routes.anthropic import AnthropicError
from lowlat.serve.routes.endpoint import Post
from lowlat.serve.routes.ollama_models import OllamaError
from lowlat.serve.routes.operations import GETS, POSTS, Get
from lowlat.serve.state import ServerState

Json = dict[str, Any]

_REFUSALS = {
    "400": "A field is invalid or not supported; param names it.",
    "404": "The model or the response does not exist.",
    "408": "The body arrived too slowly, or the deadline passed.",
    "413": "The body is too large.",
    "415": "The Content-Type is not application/json.",
    "429": "The queue is full; retry after Retry-After seconds.",
    "431": "The request's line and headers are too large.",
    "500": "An internal error.",
    "503": "The server is shutting down, its engine has stopped, or the model is not in memory.",
    "529": "The server is shutting down, its engine has stopped, or the model is not in memory.",
}
_POST_REFUSALS = {
    ErrorResponse: _REFUSALS.keys() - {"529"},
    AnthropicError: _REFUSALS.keys() - {"503"},
    OllamaError: _REFUSALS.keys() - {"529"},
}
_GET_REFUSALS = ("400", "404", "431", "500", "503")


def openapi_route(state: ServerState) -> Route:
    """The route of the document, which is built once."""
    body = json.dumps(document(state)).encode()

    async def get_openapi(request: Request) -> Response:
        return Response(body, media_type="application/json")

    return Route("/openapi.json", get_openapi)


def document(state: ServerState) -> Json:
    """The document of one server; requests may name only its models."""
    refs, shared = _schemas()
    schemas = dict(shared)
    model = {"type": "string", "enum": list(state.models.names)}
    for operation in POSTS:
        schema = schemas[operation.request.__name__]
        properties = {**schema["properties"], "model": model}
        schemas[operation.request.__name__] = {**schema, "properties": properties}
    infos = [model.info for model in state.models.models if model.info is not None]
    if len(infos) == len(state.models.models):
        largest = max(info.config.vocab_size for info in infos) - 1
        schemas[TokenId.__name__] = {**schemas[TokenId.__name__], "maximum": largest}
    has_keys = bool(state.config.api_keys)
    paths: dict[str, Json] = {}
    for operation in POSTS:
        paths[operation.path] = {"post": _post(operation, refs, has_keys)}
    for operation in GETS:
        described = _get(operation, refs, state, has_keys)
        paths.setdefault(operation.path, {})[operation.method] = described
    components: Json = {"schemas": schemas}
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "lowlat", "version": version("lowlat")},
        "paths": paths,
        "components": components,
    }


@functools.cache
def _schemas() -> tuple[dict[type[BaseModel], Json], Json]:
    """References to the models' schemas, and all schemas by name: the same for every server."""
    requests = [operation.request for operation in POSTS]
    responses = [ErrorResponse, *(o.response for o in (*POSTS, *GETS) if o.response is not None)]
    responses += [operation.chunk for operation in POSTS if operation.chunk is not None]
    responses += [operation.error for operation in POSTS]
    pairs: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((model, "validation") for model in requests),
        *((model, "serialization") for model in dict.fromkeys(responses)),
    ]
    refs, definitions = models_json_schema(pairs, ref_template="#/components/schemas/{model}")
    by_model: dict[type[BaseModel], Json] = {model: refs[model, mode] for model, mode in pairs}
    return by_model, definitions["$defs"]


def _post(operation: Post, refs: dict[type[BaseModel], Json], has_keys: bool) -> Json:
    content: Json = {"application/json": {"schema": refs[operation.response]}}
    if operation.is_ndjson:
        content["application/x-ndjson"] = {"schema": refs[operation.response]}
    elif operation.chunk is not None:
        content["text/event-stream"] = {"schema": _events(refs[operation.chunk])}
    body = {"application/json": {"schema": refs[operation.request]}}
    return {
        "operationId": operation.handle.__name__,
        "summary": (operation.handle.__doc__ or "").splitlines()[0],
        "requestBody": {"required": True, "content": body},
        "responses": {
            "200": {"description": "The response.", "content": content},
            **_refusals(_POST_REFUSALS[operation.error], refs, has_keys, operation.error),
        },
        **_security(operation.path, has_keys),
    }


def _events(data: Json) -> Json:
    """Schema of a stream's events; `data` is that of all data fields but the last."""
    chunk = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    properties: Json = {
        "event": {"type": "string"},
        "data": {"anyOf": [chunk, {"const": "[DONE]"}]},
    }
    return {"type": "object", "properties": properties, "required": ["data"]}


def _get(
    operation: Get, refs: dict[type[BaseModel], Json], state: ServerState, has_keys: bool
) -> Json:
    schema = {"type": "string"} if operation.response is None else refs[operation.response]
    kind = "text/plain" if operation.response is None else "application/json"
    name = operation.path.strip("/").replace("/", "_").replace("{id}", "one")
    described: Json = {
        "operationId": name if operation.method == "get" else f"{operation.method}_{name}",
        "summary": operation.summary,
        "responses": {
            "200": {"description": operation.summary, "content": {kind: {"schema": schema}}},
            **_refusals(_GET_REFUSALS, refs, has_keys, operation.error),
        },
        **_security(operation.path, has_keys),
    }
    if operation.parameter is not None:
        named: Json = {"type": "string"}
        if operation.values == "models":
            named["enum"] = list(state.models.names)
        described["parameters"] = [
            {"name": operation.parameter, "in": "path", "required": True, "schema": named},
            *_query(operation.query),
        ]
    return described


def _query(model: type[BaseModel] | None) -> list[Json]:
    if model is None:
        return []
    fields = model.model_json_schema()["properties"].items()
    return [{"name": name, "in": "query", "schema": schema} for name, schema in fields]


def _refusals(
    statuses: Iterable[str],
    refs: dict[type[BaseModel], Json],
    has_keys: bool,
    error: type[BaseModel],
) -> Json:
    texts = {status: _REFUSALS[status] for status in statuses}
    texts["403"] = "Host or Origin is not allowed."
    texts["405"] = "The path does not allow the method."
    if has_keys:
        texts["401"] = "A valid API key is required."
    content = {"application/json": {"schema": refs[error]}}
    return {
        status: {"description": text, "content": content} for status, text in sorted(texts.items())
    }


def _security(path: str, has_keys: bool) -> Json:
    return {"security": [{"key": []}]} if has_keys and path not in OPEN_PATHS else {}
