"""Ollama's API about models: GET /api/tags, /api/ps and /api/version, POST /api/show."""

import hashlib
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lowlat.serve.protocol.base import WireModel
from lowlat.serve.routes.context import RequestContext
from lowlat.serve.routes.endpoint import Post, json_response
from lowlat.serve.routes.models import Version
from lowlat.serve.routes.ollama_request import OllamaShowRequest
from lowlat.serve.served_model import ServedModel
from lowlat.serve.state import ServerState

NEVER = "9999-12-31T23:59:59Z"


class OllamaError(WireModel):
    error: str
    """Human-readable, one line."""
    param: str | None
    """Path of the invalid field."""
    code: str | None


class ModelDetails(WireModel):
    parent_model: str = ""
    """Base model of a LoRA adapter."""
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
    """Bytes of the weights, of an adapter those of its base model; 0 until they are known."""
    digest: str
    """Digest of name and config, not of the weights."""
    details: ModelDetails


class OllamaModels(WireModel):
    models: list[OllamaModel]


class RunningModel(OllamaModel):
    expires_at: str
    """When the model is unloaded if no request uses it."""
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
        entries = [
            _entry(model, self._state, name)
            for model in self._state.models.models
            for name in (model.name, *model.adapters)
        ]
        return json_response(OllamaModels(models=[OllamaModel(**entry) for entry in entries]))

    async def list_running(self, request: Request) -> Response:
        seconds = self._state.config.unload_seconds
        running = [
            RunningModel(
                **_entry(model, self._state, model.name),
                context_length=model.info.context,
                expires_at=_expiry(model, seconds),
            )
            for model in self._state.models.models
            if model.loaded is not None and model.info is not None
        ]
        return json_response(RunningModels(models=running))

    async def get_version(self, request: Request) -> Response:
        return json_response(Version(version=version("lowlat")))


async def ollama_show(ctx: RequestContext, request: OllamaShowRequest) -> Response:
    """Describe a served model (Ollama's API)."""
    return json_response(_description(ctx.served, ctx.state, ctx.model_name))


SHOW = Post(
    path="/api/show",
    request=OllamaShowRequest,
    response=ModelDescription,
    handle=ollama_show,
    needs_model=False,
    error=OllamaError,
)


def timestamp(seconds: int | float | None = None) -> str:
    """A Unix time, by default the present one, as RFC 3339 has it."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat().replace("+00:00", "Z")


def _expiry(model: ServedModel, seconds: int | float | None) -> str:
    """When an idle model will be unloaded; the end of times if only for another one."""
    if seconds is None or model.prepare is None:
        return NEVER
    since = 0.0 if model.num_requests else time.monotonic() - model.last_used
    return timestamp(time.time() + max(0.0, seconds - since))


def _entry(model: ServedModel, state: ServerState, name: str) -> dict[str, Any]:
    """A model, or its adapter `name`."""
    config = "" if model.info is None else repr(model.info.config)
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(state.started_at),
        "size": 0 if model.info is None else model.info.weights_bytes,
        "digest": hashlib.sha256(f"{name} {config}".encode()).hexdigest(),
        "details": _details(model, name),
    }


def _details(model: ServedModel, name: str) -> ModelDetails:
    info = model.info
    family = "" if info is None else info.config.model_type
    return ModelDetails(
        parent_model="" if name == model.name else model.name,
        format="lowlat",
        family=family,
        families=[family] if family else [],
        parameter_size="" if info is None else _short(info.num_parameters),
        quantization_level=(info and info.weight_format) or "",
    )


def _short(count: int) -> str:
    """A number of parameters, such as 134.5M or 1.2B."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _description(model: ServedModel, state: ServerState, name: str) -> ModelDescription:
    info = model.info
    details, modified_at = _details(model, name), timestamp(state.started_at)
    if info is None:
        return ModelDescription(
            template="",
            details=details,
            model_info={},
            capabilities=["completion"],
            modified_at=modified_at,
        )
    family = info.config.model_type
    capabilities = ["embedding"] if info.is_embedding else ["completion"]
    capabilities += ["tools"] if info.supports_tools else []
    capabilities += ["thinking"] if info.reasoning else []
    return ModelDescription(
        template=info.chat_template or "",
        details=details,
        model_info={
            "general.architecture": family,
            "general.parameter_count": info.num_parameters,
            f"{family}.context_length": info.context,
            f"{family}.embedding_length": info.config.hidden_size,
            f"{family}.block_count": info.config.num_hidden_layers,
        },
        capabilities=capabilities,
        modified_at=modified_at,
    )
