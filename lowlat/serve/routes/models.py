"""GET /v1/models, /health, /ready and /version.

/health reports whether the engine makes progress, /ready whether new requests are accepted.
"""

from importlib.metadata import version
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lowlat.serve.chat.template_features import TemplateFeatures
from lowlat.serve.generation import Draining, EngineDead
from lowlat.serve.protocol.base import WireModel
from lowlat.serve.routes.endpoint import json_response
from lowlat.serve.state import ServerState


class ModelCard(WireModel):
    """OpenAI's fields, then extensions."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time in seconds when the server started."""
    owned_by: Literal["lowlat"] = "lowlat"
    max_model_len: int
    """Context length: maximum number of tokens of prompt and output together."""
    cache_bytes_per_token: int
    cache_dtype: str
    batch_invariant: bool
    """Whether tokens are independent of batch composition and speculative decoding."""
    has_chat_template: bool
    """Without a chat template, only completions are available."""
    supports_tools: bool
    reasoning: bool
    """Whether outputs may begin with reasoning, returned as reasoning_content."""
    chat_template_kwargs: list[str]
    """Variables of the chat template that a request may set."""


class ModelList(WireModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(WireModel):
    status: Literal["ok"] = "ok"


class Version(WireModel):
    version: str
    """Version of lowlat."""


class InfoRoutes:
    """GET routes of one server; the model card is built once."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._card = model_card(state)

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{id:path}", self.get_model),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/version", self.version),
        ]

    async def list_models(self, request: Request) -> Response:
        return json_response(ModelList(data=[self._card]))

    async def get_model(self, request: Request) -> Response:
        self._state.check_model(request.path_params["id"])
        return json_response(self._card)

    async def health(self, request: Request) -> Response:
        """200 while the engine makes progress or is idle."""
        if not self._state.engine.is_healthy:
            raise EngineDead
        return json_response(Status())

    async def version(self, request: Request) -> Response:
        return json_response(Version(version=version("lowlat")))

    async def ready(self, request: Request) -> Response:
        """200 while new requests are accepted."""
        if self._state.is_draining:
            raise Draining
        return await self.health(request)


def model_card(state: ServerState) -> ModelCard:
    """The served model as /v1/models shows it."""
    model = state.model
    dialect = TemplateFeatures.of(model.tokenizer)
    has_template = model.tokenizer.chat_template is not None
    return ModelCard(
        id=state.model_name,
        created=state.started_at,
        max_model_len=model.context,
        cache_bytes_per_token=model.cache_bytes_per_token,
        cache_dtype=model.cache_dtype,
        batch_invariant=model.runner.is_batch_invariant,
        has_chat_template=has_template,
        supports_tools=has_template and dialect.tools is not None,
        reasoning=has_template and dialect.reasoning is not None,
        chat_template_kwargs=sorted(dialect.variables),
    )
