"""Table of API operations: the modules of this package define the POSTs.

`serve.app` builds the routes from it, `routes.openapi` the OpenAPI document.
"""

from dataclasses import dataclass

from pydantic import BaseModel

from lowlat.serve.routes.anthropic import COUNT_TOKENS, MESSAGES
from lowlat.serve.routes.chat import CHAT
from lowlat.serve.routes.completions import COMPLETIONS
from lowlat.serve.routes.models import ModelCard, ModelList, Status
from lowlat.serve.routes.responses import RESPONSES
from lowlat.serve.routes.tokens import DETOKENIZE, TOKENIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class Get:
    """An operation without a body; `response` None: text."""

    path: str
    summary: str
    response: type[BaseModel] | None
    parameter: str | None = None
    """Name of the path parameter."""


POSTS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT_TOKENS, TOKENIZE, DETOKENIZE)
GETS = (
    Get(path="/v1/models", summary="The served model, in a list.", response=ModelList),
    Get(
        path="/v1/models/{id}",
        summary="The served model.",
        response=ModelCard,
        parameter="id",
    ),
    Get(path="/health", summary="Liveness: whether the engine makes progress.", response=Status),
    Get(path="/ready", summary="Readiness: whether new requests are accepted.", response=Status),
    Get(path="/metrics", summary="Metrics in Prometheus' text format.", response=None),
)
