"""Ollama's API about models: GET /api/tags, /api/ps and /api/version, POST /api/show."""

import hashlib
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lowlat.model.quant import weight_format
from lowlat.serve.protocol.base import WireModel
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import Post, json_response
from lowlat.serve.routes.models import Version, model_card
from lowlat.serve.routes.ollama_request import OllamaShowRequest
from lowlat.serve.state import ServerState


class OllamaError(WireModel):
    error: str
    """Human-readable, one line."""
    param: str | None
    """Path of the invalid field."""
    code: str | None


class ModelDetails(WireModel):
    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(WireModel):
    name: str
    model: str
    modified_at: str
    """When the server started."""
    size: int
    """Bytes of the weights."""
    digest: str
    """Of the name and the config, not of the weights."""
    details: ModelDetails


class OllamaModels(WireModel):
    models: list[OllamaModel]


class RunningModel(OllamaModel):
    expires_at: str = "9999-12-31T23:59:59Z"
    """The model stays loaded."""
    size_vram: int = 0
    context_length: int


class RunningModels(WireModel):
    models: list[RunningModel]


class ModelDescription(WireModel):
    modelfile: str = ""
    parameters: str = ""
    template: str
    """The chat template, in Jinja's syntax."""
    details: ModelDetails
    model_info: dict[str, int | str]
    capabilities: list[str]
    modified_at: str


class OllamaRoutes:
    """GET routes of one server."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def routes(self) -> list[Route]:
        return [
            Route("/api/tags", self.list_models),
            Route("/api/ps", self.list_running),
            Route("/api/version", self.get_version),
        ]

    async def list_models(self, request: Request) -> Response:
        return json_response(OllamaModels(models=[OllamaModel(**_entry(self._state))]))

    async def list_running(self, request: Request) -> Response:
        context = self._state.model.context
        running = RunningModel(**_entry(self._state), context_length=context)
        return json_response(RunningModels(models=[running]))

    async def get_version(self, request: Request) -> Response:
        return json_response(Version(version=version("lowlat")))


async def ollama_show(ctx: RequestContext, request: OllamaShowRequest) -> Response:
    """Describe the served model (Ollama's API)."""
    return json_response(_description(ctx.state))


SHOW = Post(
    path="/api/show",
    request=OllamaShowRequest,
    response=ModelDescription,
    handle=ollama_show,
    error=OllamaError,
)


def timestamp(seconds: int | float | None = None) -> str:
    """A Unix time, by default the present one, as RFC 3339 has it."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat().replace("+00:00", "Z")


def _entry(state: ServerState) -> dict[str, Any]:
    model = state.model
    weights = sum(parameter.nbytes for parameter in model.transformer.parameters())
    identity = f"{state.model_name} {model.config!r}"
    return {
        "name": state.model_name,
        "model": state.model_name,
        "modified_at": timestamp(state.started_at),
        "size": weights,
        "digest": hashlib.sha256(identity.encode()).hexdigest(),
        "details": _details(state),
    }


def _details(state: ServerState) -> ModelDetails:
    model = state.model
    family = model.config.model_type
    return ModelDetails(
        format="lowlat",
        family=family,
        families=[family],
        parameter_size=_short(model.num_parameters),
        quantization_level=weight_format(model.transformer, model.transformer.embed_tokens.dtype),
    )


def _short(count: int) -> str:
    """A number of parameters, such as 134.5M or 1.2B."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _description(state: ServerState) -> ModelDescription:
    model, card = state.model, model_card(state)
    family = model.config.model_type
    capabilities = ["completion"] if model.pooling is None else ["embedding"]
    capabilities += ["tools"] if card.supports_tools else []
    capabilities += ["thinking"] if card.reasoning else []
    return ModelDescription(
        template=model.tokenizer.chat_template or "",
        details=_details(state),
        model_info={
            "general.architecture": family,
            "general.parameter_count": model.num_parameters,
            f"{family}.context_length": model.context,
            f"{family}.embedding_length": model.config.hidden_size,
            f"{family}.block_count": model.config.num_hidden_layers,
        },
        capabilities=capabilities,
        modified_at=timestamp(state.started_at),
    )
