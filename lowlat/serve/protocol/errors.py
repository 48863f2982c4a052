"""Errors of the API: the exception for invalid requests and the model of error responses.

`http.errors` turns exceptions into responses.
"""

import contextlib
from collections.abc import Iterator

from lowlat.serve.protocol.base import WireModel
from lowlat.utils.errors import UserError


class RequestError(Exception):
    """An invalid request: 4xx status, one-line message, the field (param) and a code.

    Not a ValueError, so that it passes through pydantic's validators unchanged.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""Code by which clients recognize a request that exceeds the context."""


def context_error(context: int, detail: str, *, param: str) -> RequestError:
    """A request that exceeds the context of `context` tokens.

    Clients recognize it by its message: litellm by OpenAI's wording, LangChain by the code.
    """
    return RequestError(
        f"This model's maximum context length is {context} tokens. {detail} "
        f"({CONTEXT_LENGTH_EXCEEDED})",
        param=param,
        code=CONTEXT_LENGTH_EXCEEDED,
    )


@contextlib.contextmanager
def about(param: str) -> Iterator[None]:
    """Raise a UserError of this context as a RequestError about the field `param`."""
    try:
        yield
    except UserError as error:
        raise RequestError(f"{param}: {error}", param=param) from error


class ErrorBody(WireModel):
    message: str
    """Human-readable, one line."""
    type: str
    param: str | None
    """Path of the invalid field."""
    code: str | None


class ErrorResponse(WireModel):
    error: ErrorBody
