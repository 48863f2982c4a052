"""GET routes: the model, health, readiness.

Owns what they tell. Health is whether the engine still advances; readiness whether new requests are
taken.
"""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lowlat.serve.chat.template_features import Dialect
from lowlat.serve.generation import Draining, EngineDead
from lowlat.serve.protocol.models import ModelCard, ModelList, Status
from lowlat.serve.routes.endpoint import json_response
from lowlat.serve.state import Services


class InfoRoutes:
    """The routes of one server; the model's card is made once."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._card = model_card(services)

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{id:path}", self.get_model),
            Route("/health", self.health),
            Route("/ready", self.ready),
        ]

    async def list_models(self, request: Request) -> Response:
        return json_response(ModelList(data=[self._card]))

    async def get_model(self, request: Request) -> Response:
        self._services.check_model(request.path_params["id"])
        return json_response(self._card)

    async def health(self, request: Request) -> Response:
        """200 while the engine's loop advances or has nothing to do."""
        if not self._services.engine.is_healthy:
            raise EngineDead
        return json_response(Status())

    async def ready(self, request: Request) -> Response:
        """200 while new requests are taken."""
        if self._services.is_draining:
            raise Draining
        return await self.health(request)


def model_card(services: Services) -> ModelCard:
    """The served model as /v1/models shows it."""
    model = services.model
    dialect = Dialect.of(model.tokenizer)
    has_template = model.tokenizer.chat_template is not None
    return ModelCard(
        id=services.model_name,
        created=services.started_at,
        context_length=model.context,
        cache_bytes_per_token=model.cache_bytes_per_token,
        cache_dtype=model.cache_dtype,
        batch_invariant=model.runner.is_batch_invariant,
        has_chat_template=has_template,
        supports_tools=has_template and dialect.supports_tools,
        reasoning=has_template and dialect.reasoning is not None,
    )
