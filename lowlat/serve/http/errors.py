"""Exceptions to responses in OpenAI's error shape: {"error": {message, type, param, code}}.

Owns which exception is which status. Faults of our own are logged and answered without details.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lowlat.serve.generation import Draining, EngineDead, Overloaded
from lowlat.serve.protocol.errors import RequestError
from lowlat.utils.errors import UserError

RETRY_SECONDS = 5
"""What Retry-After says while the server shuts down."""

API_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}
_FIELD = re.compile(r"(?:the |option ')?([a-z][a-z_]*)")


class GenerationFailed(Exception):
    """A completion ended because the engine could not go on with it; a 500."""


def error_object(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    """The JSON object of an error."""
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as a whole response."""
    return Response(
        # ASCII, so that half characters of a hostile request cannot break the answer to it.
        json.dumps(error_object(status, message, param=param, code=code)),
        status_code=status,
        media_type="application/json",
        headers=API_HEADERS | dict(headers or {}),
    )


def describe(error: Exception) -> tuple[int, str, str | None, str | None]:
    """Status, message, param and code of `error`; 500 without details for one of our own."""
    match error:
        case RequestError():
            return error.status, error.message, error.param, error.code
        case UserError():
            return 400, str(error), _field_of(str(error)), None
        case Overloaded():
            return 429, "the server is busy; try again later", None, "overloaded"
        case Draining():
            return 503, "the server is shutting down", None, "shutting_down"
        case EngineDead():
            return 503, "the engine has stopped, or does not advance", None, "engine_stopped"
        case HTTPException():
            return error.status_code, _http_message(error), None, _CODES.get(error.status_code)
        case _:
            return 500, "internal error; its cause is in the server's log", None, "internal_error"


def response_to(error: Exception) -> Response:
    """The response that tells a client of `error`."""
    status, message, param, code = describe(error)
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers.update(error.headers or {})
    elif isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after)
    elif status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if code == "deadline_exceeded":
        # OpenAI's clients would ask twice more, and miss the deadline again.
        headers["X-Should-Retry"] = "false"
    return error_response(status, message, param=param, code=code, headers=headers)


async def answer_error(request: Request, error: Exception) -> Response:
    """`response_to` as Starlette's handlers are called."""
    return response_to(error)


def _http_message(error: HTTPException) -> str:
    if error.status_code == 404:
        return "there is nothing at this path"
    if error.status_code == 405:
        return "this path does not allow the method"
    return error.detail


def _field_of(message: str) -> str | None:
    """The field that the engine's messages begin with (`top_p must be`, `the prompt has`)."""
    match = _FIELD.match(message)
    return match[1] if match else None


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors about a field in `names` tell of the field that it is there.

    Raises RequestError in place of RequestError and UserError about those fields.
    """
    try:
        yield
    except (RequestError, UserError) as error:
        status, message, param, code = describe(error)
        field = re.split(r"[.\[]", param or "", maxsplit=1)[0]
        if field not in names:
            raise
        new = names[field]
        # What lies inside has another place in the field that the client sent.
        text = re.sub(rf"\b{field}\b(?:[.\[][^: ]*)?", new, message)
        raise RequestError(
            text if text.startswith(new) else f"{new}: {text}", param=new, code=code, status=status
        ) from error
