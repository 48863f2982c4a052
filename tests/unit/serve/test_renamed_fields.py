"""Errors about renamed fields."""

import pytest

from lowlat.serve.generation import Overloaded
from lowlat.serve.http.errors import renamed_fields
from lowlat.serve.protocol.errors import RequestError
from lowlat.utils.errors import UserError

NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "prompt": "input"}


@pytest.mark.parametrize(
    ("error", "param", "message"),
    [
        (RequestError("messages: too long", param="messages"), "input", "input: too long"),
        (
            RequestError("messages[3].role: not here", param="messages[3].role"),
            "input",
            "input: not here",
        ),
        (
            UserError("max_tokens 9 is too much; set max_tokens to 3"),
            "max_output_tokens",
            "max_output_tokens 9 is too much; set max_output_tokens to 3",
        ),
        (UserError("the prompt is empty"), "input", "input: the input is empty"),
    ],
)
def test_fields_get_their_other_name(error: Exception, param: str, message: str) -> None:
    """Regression: errors that name a field the client has never heard of."""
    with pytest.raises(RequestError) as caught, renamed_fields(NAMES):
        raise error
    assert (caught.value.param, caught.value.message) == (param, message)
    assert caught.value.status == 400


def test_status_and_code_stay() -> None:
    with pytest.raises(RequestError) as caught, renamed_fields(NAMES):
        raise RequestError("prompt: no", param="prompt", code="c", status=408)
    assert (caught.value.status, caught.value.code) == (408, "c")


@pytest.mark.parametrize(
    "error",
    [UserError("top_p must be 1"), RequestError("no field"), Overloaded(3), RuntimeError("prompt")],
)
def test_all_else_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, renamed_fields(NAMES):
        raise error
    assert caught.value is error
