"""POST /v1/embeddings, and Ollama's /api/embed: pooled hidden states of texts.

Only for embedding models: the engine pools the final hidden states of each prompt in its batches.
"""

import base64
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from starlette.responses import Response

from lowlat.config.hf.sentence_transformers import Pooling
from lowlat.generate.params import SamplingParams
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.chat.prompt import encode_text
from lowlat.serve.http.errors import API_HEADERS, renamed_fields
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import ApiRequest, TokenIds, WireModel
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.hints import Hint
from lowlat.serve.protocol.sampling import HintText
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import Post
from lowlat.serve.routes.ollama_models import OllamaError
from lowlat.serve.routes.ollama_request import KeepAlive, ModelName

WAVE = 32
"""Texts of one request that are in the queue at once: others keep their places."""
NUMBERS = "<f4"
"""Little-endian fp32: embeddings in base64."""

Texts = Annotated[
    list[str], Field(fail_fast=True, min_length=1, max_length=limits.MAX_EMBEDDING_INPUTS)
]
IdLists = Annotated[
    list[TokenIds], Field(fail_fast=True, min_length=1, max_length=limits.MAX_EMBEDDING_INPUTS)
]
Dimensions = Annotated[int, Field(ge=1)]


class EmbeddingsRequest(ApiRequest):
    """Texts, or their token ids, to embed."""

    input: str | Texts | TokenIds | IdLists
    encoding_format: Literal["float", "base64"] | None = None
    """base64: little-endian fp32. Default float."""
    dimensions: Dimensions | None = None
    """Leading dimensions to keep; the rest is cut off and the length becomes 1 again."""
    user: Hint[HintText | None] = None


class OllamaEmbedRequest(ApiRequest):
    """Texts to embed (Ollama's API)."""

    model: ModelName
    input: str | Texts
    dimensions: Dimensions | None = None
    truncate: Hint[bool | None] = None
    """A text that exceeds the context is an error."""
    options: Hint[dict[str, object] | None] = None
    keep_alive: KeepAlive = None


class Embedding(WireModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(WireModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(WireModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class OllamaEmbeddings(WireModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    """Nanoseconds, as the next."""
    load_duration: int = 0
    prompt_eval_count: int
    """Tokens of all texts."""


async def create_embeddings(ctx: RequestContext, request: EmbeddingsRequest) -> Response:
    """Embed one or more texts."""
    match request.input:
        case str() as text:
            inputs: list[str | list[int]] = [text]
        case [int(), *_]:
            inputs = [[token for token in request.input if isinstance(token, int)]]
        case _:
            inputs = [item for item in request.input if isinstance(item, str | list)]
    vectors = await _embed(ctx, inputs, request.dimensions)

    def body() -> str:
        data = [
            Embedding(
                index=index,
                embedding=(
                    base64.b64encode(vector.astype(NUMBERS).tobytes()).decode()
                    if request.encoding_format == "base64"
                    else vector.tolist()
                ),
            )
            for index, vector in enumerate(vectors)
        ]
        count = ctx.prompt_tokens
        usage = EmbeddingUsage(prompt_tokens=count, total_tokens=count)
        return EmbeddingList(data=data, model=request.model, usage=usage).model_dump_json()

    return await _response(ctx, body)


async def ollama_embed(ctx: RequestContext, request: OllamaEmbedRequest) -> Response:
    """Embed one or more texts (Ollama's API)."""
    texts = [request.input] if isinstance(request.input, str) else request.input
    vectors = await _embed(ctx, texts, request.dimensions, normalizes=True)

    def body() -> str:
        return OllamaEmbeddings(
            model=request.model,
            embeddings=[vector.tolist() for vector in vectors],
            total_duration=round(ctx.seconds * 1e9),
            prompt_eval_count=ctx.prompt_tokens,
        ).model_dump_json()

    return await _response(ctx, body)


EMBEDDINGS = Post(
    path="/v1/embeddings",
    request=EmbeddingsRequest,
    response=EmbeddingList,
    handle=create_embeddings,
)
OLLAMA_EMBED = Post(
    path="/api/embed",
    request=OllamaEmbedRequest,
    response=OllamaEmbeddings,
    handle=ollama_embed,
    error=OllamaError,
)


async def _response(ctx: RequestContext, body: Callable[[], str]) -> Response:
    """The JSON text that `body` writes off the event loop: it may be megabytes."""
    text = await ctx.state.workers.run(body)
    return Response(text, media_type="application/json", headers=API_HEADERS)


async def _embed(
    ctx: RequestContext,
    inputs: Sequence[str | list[int]],
    dimensions: int | None,
    *,
    normalizes: bool = False,
) -> list[np.ndarray]:
    """The embeddings of `inputs`, fp32, in their order. Raises RequestError 404 if the model is no
    embedding model.
    """
    pooling = _pooling(ctx)
    size = ctx.model.config.hidden_size
    if dimensions is not None and dimensions > size:
        raise RequestError(
            f"dimensions: the embeddings of this model have {size}; ask for at most as many",
            param="dimensions",
        )
    params = SamplingParams(max_tokens=1)
    vectors: list[np.ndarray] = []
    with renamed_fields({"prompt": "input", "max_tokens": "input"}):
        prompts = await ctx.state.workers.run(_encode, ctx.engine, inputs, params)
        for start in range(0, len(prompts), WAVE):
            wave = prompts[start : start + WAVE]
            running = [await ctx.submit(ids, params, pooling=pooling.mode) for ids in wave]
            for generation in running:
                pooled = np.array(await ctx.embedding(generation))
                is_unit = pooling.normalize or normalizes or dimensions is not None
                vectors.append(_finished(pooled, dimensions, is_unit))
    return vectors


def _pooling(ctx: RequestContext) -> Pooling:
    pooling = ctx.model.pooling
    if pooling is None:
        raise RequestError(
            f"the model '{ctx.model_name}' is not an embedding model: its folder has no"
            " modules.json (sentence-transformers); serve an embedding model",
            param="model",
            code="not_an_embedding_model",
            status=404,
        )
    return pooling


def _encode(
    engine: AsyncEngine, inputs: Sequence[str | list[int]], params: SamplingParams
) -> list[list[int]]:
    """Token ids of all inputs. Raises RequestError and UserError for one the engine refuses."""
    model = engine.model
    prompts: list[list[int]] = []
    for given in inputs:
        ids = encode_text(model, given, "input") if isinstance(given, str) else given
        engine.check(ids, params)
        prompts.append(ids)
    return prompts


def _finished(pooled: np.ndarray, dimensions: int | None, is_unit: bool) -> np.ndarray:
    """`pooled` (fp64) cut to `dimensions` and, with is_unit, of length 1; in fp32."""
    vector = pooled[:dimensions]
    if is_unit:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return vector.astype(np.float32)
