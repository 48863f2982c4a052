"""POST /tokenize and /detokenize: text or chat to token ids, and back."""

from starlette.responses import Response

from lowlat.generate.model import Model
from lowlat.serve.chat.prompt import check_text_size, prepare_chat
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import json_response


async def tokenize(ctx: RequestContext, request: TokenizeRequest) -> Response:
    """Token ids of a text or of a chat."""
    ctx.state.check_model(request.model)
    return json_response(await ctx.state.workers.run(_tokenize, ctx.state.model, request))


async def detokenize(ctx: RequestContext, request: DetokenizeRequest) -> Response:
    """Text of token ids."""
    ctx.state.check_model(request.model)
    return json_response(await ctx.state.workers.run(_detokenize, ctx.state.model, request))


def _tokenize(model: Model, request: TokenizeRequest) -> TokenizeResponse:
    if request.messages is not None:
        chat = ChatRequest(model=request.model, messages=request.messages, tools=request.tools)
        ids = list(prepare_chat(model, chat).ids)
    else:
        check_text_size(model, [request.prompt or ""], "prompt")
        ids = model.tokenizer.encode(
            request.prompt or "", add_special_tokens=request.add_special_tokens is not False
        )
    texts = None
    if request.return_token_strs:
        texts = [model.tokenizer.id_to_bytes(id).decode("utf-8", "replace") for id in ids]
    return TokenizeResponse(
        tokens=ids, token_strs=texts, count=len(ids), max_model_len=model.context
    )


def _detokenize(model: Model, request: DetokenizeRequest) -> DetokenizeResponse:
    if max(request.tokens) >= model.config.vocab_size:
        raise RequestError(
            f"tokens: an id exceeds the vocabulary size of {model.config.vocab_size}",
            param="tokens",
        )
    text = model.tokenizer.decode(request.tokens, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text)
