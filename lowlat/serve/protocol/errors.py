"""RequestError: what is wrong with a request, on its way to an answer in OpenAI's error shape.

Owns the exception alone; `serve.errors` turns it, and every other exception, into a response.
"""

from lowlat.serve.protocol.base import WireModel


class RequestError(Exception):
    """A fault of the request: status 4xx, one line for people, the field and a code for programs.

    No ValueError, so that pydantic's validators let it pass unchanged.
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


class ErrorBody(WireModel):
    message: str
    """One line for people."""
    type: str
    param: str | None
    """Path of the field at fault."""
    code: str | None


class ErrorResponse(WireModel):
    error: ErrorBody
