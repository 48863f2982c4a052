"""GET /v1/models, /health, /ready and /version.

/health reports whether an engine makes progress, /ready whether new requests are accepted.
"""

from importlib.metadata import version
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lowlat.serve.generation import Draining
from lowlat.serve.protocol.base import WireModel
from lowlat.serve.routes.endpoint import json_response
from lowlat.serve.served_model import ModelState, ServedModel
from lowlat.serve.state import ServerState


class ModelCard(WireModel):
    """OpenAI's fields, then extensions. Facts that are null are known once the model is loaded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time in seconds when the server started."""
    owned_by: Literal["lowlat"] = "lowlat"
    parent: str | None = None
    """Base model of a LoRA adapter."""
    aliases: list[str]
    """Further names that requests may use."""
    state: ModelState
    """Models that are not in memory are loaded by the first request."""
    max_model_len: int | None
    """Context length: maximum number of tokens of prompt and output together."""
    cache_bytes_per_token: int | None
    cache_dtype: str | None
    batch_invariant: bool | None
    """Whether tokens are independent of batch composition and speculative decoding."""
    has_chat_template: bool | None
    """Without a chat template, only completions are available."""
    supports_tools: bool | None
    reasoning: bool | None
    """Whether outputs may begin with reasoning, returned as reasoning_content."""
    chat_template_kwargs: list[str] | None
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
    """GET routes of one server."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{id:path}", self.get_model),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/version", self.version),
        ]

    async def list_models(self, request: Request) -> Response:
        cards = [
            model_card(model, self._state, name)
            for model in self._state.models.models
            for name in (model.name, *model.adapters)
        ]
        return json_response(ModelList(data=cards))

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["id"]
        model = self._state.models.find(name)
        name = name if name in model.adapters else model.name
        return json_response(model_card(model, self._state, name))

    async def health(self, request: Request) -> Response:
        """200 while an engine makes progress or is idle, or a model may be loaded."""
        self._state.models.check_health()
        return json_response(Status())

    async def version(self, request: Request) -> Response:
        return json_response(Version(version=version("lowlat")))

    async def ready(self, request: Request) -> Response:
        """200 while new requests are accepted."""
        if self._state.is_draining:
            raise Draining
        return await self.health(request)


def model_card(model: ServedModel, state: ServerState, name: str) -> ModelCard:
    """A model as /v1/models shows it, or its adapter `name`."""
    info = model.info
    is_adapter = name != model.name
    return ModelCard(
        id=name,
        created=state.started_at,
        parent=model.name if is_adapter else None,
        aliases=[] if is_adapter else list(model.aliases),
        state=model.state,
        max_model_len=info and info.context,
        cache_bytes_per_token=info and info.cache_bytes_per_token,
        cache_dtype=info and info.cache_dtype,
        batch_invariant=info and info.batch_invariant,
        has_chat_template=info and info.chat_template is not None,
        supports_tools=info and info.supports_tools,
        reasoning=info and info.reasoning,
        chat_template_kwargs=info and list(info.chat_template_kwargs),
    )
