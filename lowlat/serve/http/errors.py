"""Error responses in the format of the API of the request's path: OpenAI's,
Anthropic's or Ollama's.

Maps exceptions to HTTP statuses. Internal errors are logged and returned without details.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lowlat.serve.generation import Draining, EngineDead, ModelUnavailable, Overloaded
from lowlat.serve.protocol.errors import (
    CONTEXT_LENGTH_EXCEEDED,
    RequestError,
    context_error,
)
from lowlat.utils.errors import ContextLengthError, UserError

RETRY_SECONDS = 5
"""Retry-After while the server shuts down."""

API_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
ANTHROPIC_PATH = "/v1/messages"
OLLAMA_PATHS = "/api/"
_CODES = {404: "not_found", 405: "method_not_allowed"}
_OVERFLOW = re.compile(r" length is (\d+) tokens\..* has (\d+) tokens")
_FIELD = re.compile(r"(?:the |option ')?([a-z][a-z_]*)")


class GenerationFailed(Exception):
    """A completion failed inside the engine; a 500."""


ErrorFormat = Callable[[int, str, str | None, str | None], tuple[int, dict[str, object]]]
"""Status, message, param and code -> the API's status and body."""


def error_object(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def openai_error(
    status: int, message: str, param: str | None, code: str | None
) -> tuple[int, dict[str, object]]:
    return status, error_object(status, message, param=param, code=code)


def anthropic_error(
    status: int, message: str, param: str | None, code: str | None
) -> tuple[int, dict[str, object]]:
    """Anthropic's format, with param and code in addition.

    Its clients know an overflow of the context by the words "prompt is too long", and read the
    sizes after them. An unavailable server has the status 529 instead of 503.
    """
    if code == "context_length_exceeded":
        sizes = _OVERFLOW.search(message)
        numbers = "" if sizes is None else f": {sizes[2]} tokens > {sizes[1]} maximum"
        message += f" (prompt is too long{numbers})"
    status = 529 if status == 503 else status
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": message, "param": param, "code": code}
    return status, {"type": "error", "error": error}


def ollama_error(
    status: int, message: str, param: str | None, code: str | None
) -> tuple[int, dict[str, object]]:
    """Ollama's format, with param and code in addition."""
    if code == _CODES[404]:
        message += "; the server cannot pull, push, create, copy or delete models"
    return status, {"error": message, "param": param, "code": code}


_ERROR_FORMAT: ContextVar[ErrorFormat] = ContextVar("lowlat_error_format", default=openai_error)


def format_of(path: str) -> ErrorFormat:
    """The format of the API that `path` belongs to."""
    if path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/"):
        return anthropic_error
    return ollama_error if path.startswith(OLLAMA_PATHS) else openai_error


@contextlib.contextmanager
def errors_of(path: str) -> Iterator[None]:
    """Within this context, `error_response` has the format of the API that `path` belongs to."""
    token = _ERROR_FORMAT.set(format_of(path))
    try:
        yield
    finally:
        _ERROR_FORMAT.reset(token)


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    status, body = _ERROR_FORMAT.get()(status, message, param, code)
    return Response(
        # ASCII, so that unpaired surrogates in a hostile request cannot break the response.
        json.dumps(body),
        status_code=status,
        media_type="application/json",
        headers=API_HEADERS | dict(headers or {}),
    )


def describe(error: Exception) -> tuple[int, str, str | None, str | None]:
    """Status, message, param and code of `error`; 500 without details for internal errors."""
    match error:
        case RequestError():
            return error.status, error.message, error.param, error.code
        case ContextLengthError():
            return describe(context_error(error.context, f"{error}", param=error.field))
        case UserError():
            return 400, str(error), _field_of(str(error)), None
        case Overloaded():
            return 429, "the server is busy; try again later", None, "overloaded"
        case Draining():
            return 503, "the server is shutting down", None, "shutting_down"
        case ModelUnavailable():
            return 503, str(error), "model", error.code
        case EngineDead():
            return 503, "the engine has stopped or hangs", None, "engine_stopped"
        case HTTPException():
            return error.status_code, _http_message(error), None, _CODES.get(error.status_code)
        case _:
            return 500, "internal error; see the server's log", None, "internal_error"


def response_to(error: Exception) -> Response:
    status, message, param, code = describe(error)
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers.update(error.headers or {})
    elif isinstance(error, Overloaded | ModelUnavailable):
        headers["Retry-After"] = str(error.retry_after)
    elif status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if code == "deadline_exceeded":
        # OpenAI's clients would retry twice and miss the deadline again.
        headers["X-Should-Retry"] = "false"
    return error_response(status, message, param=param, code=code, headers=headers)


async def handle_error(request: Request, error: Exception) -> Response:
    """`response_to` with the signature of Starlette's exception handlers."""
    return response_to(error)


def _http_message(error: HTTPException) -> str:
    if error.status_code == 404:
        return "no such path"
    if error.status_code == 405:
        return "method not allowed for this path"
    return error.detail


def _field_of(message: str) -> str | None:
    """The field that an engine's message begins with (`top_p must be`, `the prompt has`)."""
    match = _FIELD.match(message)
    return match[1] if match else None


@contextlib.contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Rename fields in errors: an error about a key of `names` becomes one about its value.

    For routes whose fields reach the engine under other names. Raises RequestError instead of
    RequestError and UserError about those fields.
    """
    try:
        yield
    except (RequestError, UserError) as error:
        status, message, param, code = describe(error)
        field = re.split(r"[.\[]", param or "", maxsplit=1)[0]
        if field not in names:
            raise
        new = names[field]
        # Paths inside the field differ between the two APIs and are dropped.
        text = re.sub(rf"\b{field}\b(?:[.\[][^: ]*)?", new, message)
        if code != CONTEXT_LENGTH_EXCEEDED and not text.startswith(new):
            text = f"{new}: {text}"
        raise RequestError(text, param=new, code=code, status=status) from error
