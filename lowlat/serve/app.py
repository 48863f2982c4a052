"""The ASGI application: routes, middleware and error handlers around the engines of models.

Assembles the parts. Handlers are in `serve.routes`; `serve.run` listens and shuts down.
"""

import contextlib
import re
import time
from collections.abc import AsyncGenerator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import Draining, EngineDead, ModelUnavailable, Overloaded
from lowlat.serve.http.errors import handle_error
from lowlat.serve.http.incoming import IncomingBodies
from lowlat.serve.http.logs import AccessLogMiddleware
from lowlat.serve.http.pages import page_routes
from lowlat.serve.http.security import SecurityMiddleware
from lowlat.serve.http.workers import WorkerPool
from lowlat.serve.metrics import Metrics
from lowlat.serve.model_registry import ModelRegistry
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.response_store import ResponseStore
from lowlat.serve.routes.endpoint import JsonEndpoint
from lowlat.serve.routes.models import InfoRoutes
from lowlat.serve.routes.ollama_models import OllamaRoutes
from lowlat.serve.routes.openapi import openapi_route
from lowlat.serve.routes.operations import POSTS
from lowlat.serve.routes.stored_responses import StoredResponseRoutes
from lowlat.serve.served_model import ServedModel
from lowlat.serve.state import ServerState
from lowlat.utils.errors import UserError

_HANDLED = (
    *(RequestError, UserError, Overloaded, Draining),
    *(EngineDead, ModelUnavailable, HTTPException),
)


def make_state(models: AsyncEngine | Sequence[ServedModel], config: ServeConfig) -> ServerState:
    """The state that the routes of one server share. `models`: the engine of a single model, which
    stays in memory, or models that are loaded on demand."""
    if isinstance(models, AsyncEngine):
        registry = ModelRegistry.of_engine(models, config)
    else:
        registry = ModelRegistry(models, config)
    return ServerState(
        models=registry,
        config=config,
        bodies=IncomingBodies(max_slow=config.max_slow_bodies),
        workers=WorkerPool(threads=config.workers, max_waiting=config.max_waiting_work),
        responses=ResponseStore(config.max_response_bytes),
        started_at=int(time.time()),
    )


def build_app(state: ServerState) -> Starlette:
    """The application. Its lifespan starts the engines and, at the end, aborts running requests.

    Every request passes the access log, then the security checks, then its route.
    """
    metrics = Metrics(state)
    routes = [
        *(Route(post.path, JsonEndpoint(state, post), methods=["POST"]) for post in POSTS),
        *InfoRoutes(state).routes(),
        *OllamaRoutes(state).routes(),
        *StoredResponseRoutes(state).routes(),
        metrics.route(),
        openapi_route(state),
        *page_routes(
            state.config.api_keys, bodies=state.bodies, body_seconds=state.config.body_seconds
        ),
    ]
    metrics.set_routes(routes)
    for route in routes:
        # Starlette's patterns end with $, which also matches before a final line break.
        route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        await state.models.start()
        try:
            yield
        finally:
            state.is_draining = True
            await state.models.drain(0.0)
            state.close()

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(AccessLogMiddleware, count=metrics.count),
            Middleware(SecurityMiddleware, config=state.config),
        ],
        exception_handlers=dict.fromkeys(_HANDLED, handle_error),
    )
    # Unknown paths get 404, not a redirect to the path with a slash.
    app.router.redirect_slashes = False
    return app
