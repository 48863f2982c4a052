"""Bodies and answers of /tokenize and /detokenize."""

from typing import Annotated

from pydantic import Field, model_validator

from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import Id, StrictModel, WireModel
from lowlat.serve.protocol.completions import TokenIds
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.messages import Message
from lowlat.serve.protocol.tools import Tool


class TokenizeRequest(StrictModel):
    """A text, or a chat as its model would read it: exactly one of prompt and messages."""

    model: Id
    prompt: str | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)] | None
    ) = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=limits.MAX_TOOLS)] | None = None
    """Functions offered in the chat."""
    add_special_tokens: bool | None = None
    """Whether what the tokenizer puts around a text is added; default true. For a prompt only."""
    return_token_strs: bool | None = None
    """Whether the text of each token is wanted."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give one of prompt and messages", param="prompt")
        if self.prompt is not None and self.tools is not None:
            raise RequestError("tools belong to messages; leave them out", param="tools")
        if self.messages is not None and self.add_special_tokens is not None:
            raise RequestError(
                "add_special_tokens has no effect on messages; leave it out",
                param="add_special_tokens",
            )
        return self


class TokenizeResponse(WireModel):
    tokens: list[int]
    token_strs: list[str] | None
    """Text of each token, U+FFFD for parts of a character, where asked for."""
    count: int
    max_model_len: int
    """Most tokens of prompt and answer together."""


class DetokenizeRequest(StrictModel):
    model: Id
    tokens: TokenIds


class DetokenizeResponse(WireModel):
    prompt: str
    """The text, special tokens included."""
