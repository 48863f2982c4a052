"""POST /tokenize and /detokenize: text or chat to token ids, and back."""

from typing import Annotated

from pydantic import Field, model_validator
from starlette.responses import Response

from lowlat.generate.model import Model
from lowlat.serve.chat.prompt import encode_text, prepare_chat
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import ApiRequest, TokenIds, WireModel
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.errors import RequestError, context_error
from lowlat.serve.protocol.messages import Message, Tool
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import Post, json_response


class TokenizeRequest(ApiRequest):
    """Exactly one of prompt (a text) and messages (a chat, rendered with the template)."""

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


class DetokenizeRequest(ApiRequest):
    tokens: TokenIds


class DetokenizeResponse(WireModel):
    prompt: str
    """The text, special tokens included."""


async def tokenize(ctx: RequestContext, request: TokenizeRequest) -> Response:
    """Token ids of a text or of a chat."""
    return await ctx.state.workers.run(_tokenize, ctx.model, request)


async def detokenize(ctx: RequestContext, request: DetokenizeRequest) -> Response:
    """Text of token ids."""
    return await ctx.state.workers.run(_detokenize, ctx.model, request)


def _tokenize(model: Model, request: TokenizeRequest) -> Response:
    if request.messages is not None:
        chat = ChatRequest(model=request.model, messages=request.messages, tools=request.tools)
        ids = list(prepare_chat(model, chat).ids)
    else:
        ids = encode_text(
            model,
            request.prompt or "",
            "prompt",
            most=limits.MAX_PROMPT_TOKENS,
            add_special_tokens=request.add_special_tokens is not False,
        )
    texts = None
    if request.return_token_strs:
        shown = {id: model.tokenizer.id_to_bytes(id).decode("utf-8", "replace") for id in set(ids)}
        texts = [shown[id] for id in ids]
    return json_response(
        TokenizeResponse(tokens=ids, token_strs=texts, count=len(ids), max_model_len=model.context)
    )


def _detokenize(model: Model, request: DetokenizeRequest) -> Response:
    if len(request.tokens) > model.context:
        raise context_error(
            model.context, f"tokens has {len(request.tokens)} ids; send fewer", param="tokens"
        )
    if max(request.tokens) >= model.config.vocab_size:
        raise RequestError(
            f"tokens: an id exceeds the vocabulary size of {model.config.vocab_size}",
            param="tokens",
        )
    text = model.tokenizer.decode(request.tokens, skip_special_tokens=False)
    return json_response(DetokenizeResponse(prompt=text))


TOKENIZE = Post(
    path="/tokenize", request=TokenizeRequest, response=TokenizeResponse, handle=tokenize
)
DETOKENIZE = Post(
    path="/detokenize", request=DetokenizeRequest, response=DetokenizeResponse, handle=detokenize
)
