"""Requests and responses of POST /tokenize and /detokenize."""

from typing import Annotated

from pydantic import Field, model_validator

from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import Id, StrictModel, WireModel
from lowlat.serve.protocol.completions import TokenIds
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.messages import Message
from lowlat.serve.protocol.tools import Tool


class TokenizeRequest(StrictModel):
    """Exactly one of prompt (a text) and messages (a chat, rendered with the template)."""

    model: Id
    prompt: str | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)] | None
    ) = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=limits.MAX_TOOLS)] | None = None
    """Functions offered in the chat."""
    add_special_tokens: bool | None = None
    """Whether to add the tokenizer's BOS and EOS tokens; default true. Only with prompt."""
    return_token_strs: bool | None = None
    """Whether to return the text of each token."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("set exactly one of prompt and messages", param="prompt")
        if self.prompt is not None and self.tools is not None:
            raise RequestError("tools requires messages; leave it out", param="tools")
        if self.messages is not None and self.add_special_tokens is not None:
            raise RequestError(
                "add_special_tokens requires prompt; leave it out",
                param="add_special_tokens",
            )
        return self


class TokenizeResponse(WireModel):
    tokens: list[int]
    token_strs: list[str] | None
    """Text of each token, with U+FFFD for incomplete characters; with return_token_strs."""
    count: int
    max_model_len: int
    """Context length: maximum number of tokens of prompt and output together."""


class DetokenizeRequest(StrictModel):
    model: Id
    tokens: TokenIds


class DetokenizeResponse(WireModel):
    prompt: str
    """The text, special tokens included."""
