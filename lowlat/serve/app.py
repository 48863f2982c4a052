"""The ASGI application: routes, guards and error shapes around an engine.

Owns how the parts fit together. What a route does is in routes_*.py; listening and ending are
`serve.run`'s.
"""

import contextlib
import re
import time
from collections.abc import AsyncGenerator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import Draining, EngineDead, Overloaded
from lowlat.serve.http.access_log import Observer
from lowlat.serve.http.errors import answer_error
from lowlat.serve.http.security import Guard
from lowlat.serve.http.workers import WorkPool
from lowlat.serve.metrics import Metrics
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.routes.endpoint import JsonEndpoint
from lowlat.serve.routes.models import InfoRoutes
from lowlat.serve.routes.openapi import openapi_route
from lowlat.serve.routes.operations import POSTS
from lowlat.serve.routes.pages import page_routes
from lowlat.serve.state import Services
from lowlat.serve.structured_outputs import Grammars
from lowlat.utils.errors import UserError

_HANDLED = (RequestError, UserError, Overloaded, Draining, EngineDead, HTTPException)


def make_services(engine: AsyncEngine, config: ServeConfig) -> Services:
    """The parts that the routes of one server share."""
    return Services(
        engine=engine,
        config=config,
        workers=WorkPool(threads=config.workers, max_waiting=config.max_waiting_work),
        grammars=Grammars(
            engine.model,
            max_waiting=config.max_waiting_grammars,
            max_bytes=config.max_grammar_bytes,
        ),
        started_at=int(time.time()),
    )


def build_app(services: Services) -> Starlette:
    """The application. Its lifespan starts the engine and ends what still runs.

    Every request passes the observer, then the guard, and only then meets a route.
    """
    metrics = Metrics(services)
    routes = [
        *(
            Route(post.path, JsonEndpoint(services, post.request, post.handle), methods=["POST"])
            for post in POSTS
        ),
        *InfoRoutes(services).routes(),
        metrics.route(),
        openapi_route(services),
        *page_routes(services.config.api_keys, body_seconds=services.config.body_seconds),
    ]
    metrics.name_routes(routes)
    for route in routes:
        # Starlette's patterns end with $, which lets a line break follow.
        route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        await services.engine.start()
        try:
            yield
        finally:
            services.is_draining = True
            await services.engine.drain(0.0)
            services.close()

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(Observer, count=metrics.count),
            Middleware(Guard, config=services.config),
        ],
        exception_handlers=dict.fromkeys(_HANDLED, answer_error),
    )
    # A redirect would answer paths that are no routes.
    app.router.redirect_slashes = False
    return app
