"""Listening and ending: one socket, uvicorn on it, and a drain when the process is told to end.

Owns the socket, the signals, how many files may be open, and uvicorn's settings. The application is
`serve.app`'s.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn

from lowlat.serve.app import build_app, make_services
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.http.connection import connection_class
from lowlat.serve.http.logs import log
from lowlat.serve.protocol import limits
from lowlat.serve.state import Services
from lowlat.utils.errors import UserError

BACKLOG = 2048
ANSWER_SECONDS = 5
"""How long answers may take to leave when nothing is generated any more."""
HURRIED_ANSWER_SECONDS = 1
"""The same after a second signal."""
SPARE_DESCRIPTORS = 256
"""Open files that connections leave to the rest of the process."""


def open_socket(config: ServeConfig) -> socket.socket:
    """A socket bound to the config's address, not listening yet: clients are refused until then.

    Raises UserError where the address is taken or is none of this machine's.
    """
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host '{config.host}': {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(config, error) from error
    return listener


def _cannot_listen(config: ServeConfig, error: OSError) -> UserError:
    return UserError(
        f"cannot listen on {config.host} port {config.port}: {error.strerror}; choose another "
        "--host or --port"
    )


def url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    engine: AsyncEngine,
    config: ServeConfig,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal cuts off what still runs.

    `on_ready` is called when connections are taken. Raises UserError where another program has
    begun to listen at the address since the socket was bound.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(config, error) from error
    asyncio.run(_run(engine, config, listener, on_ready))


async def _run(
    engine: AsyncEngine, config: ServeConfig, listener: socket.socket, on_ready: Callable[[], None]
) -> None:
    services = make_services(engine, config)
    server = uvicorn.Server(_uvicorn_config(services))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        # What there is by now stays to the end. The collector would look through all of it again
        # and again, and hold up every request for some 0.2 s each time.
        gc.collect()
        gc.freeze()
        _handle_signals(server, services)
        if not engine.model.runner.is_batch_invariant:
            log(logging.WARNING, "without native kernels a token may depend on what else runs")
        log(logging.INFO, "ready", model=services.model_name, url=url_of(listener))
        on_ready()
    try:
        await serving
    finally:
        # At the program's end everything is to be freed.
        gc.unfreeze()


def _room(connections: int) -> int:
    """`connections`, or as many as the system lets this process open beside its own files."""
    try:
        import resource
    except ImportError:
        return connections
    kind, needed = resource.RLIMIT_NOFILE, connections + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(kind)
    if 0 <= soft < needed:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (needed if hard < 0 else min(needed, hard), hard))
        soft = resource.getrlimit(kind)[0]
    return connections if soft < 0 else max(1, min(connections, soft - SPARE_DESCRIPTORS))


def _uvicorn_config(services: Services) -> uvicorn.Config:
    config = services.config
    return uvicorn.Config(
        build_app(services),
        http=connection_class(config, max_connections=_room(config.max_connections)),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # Addresses and schemes that a client claims in headers are not believed.
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=config.keep_alive_seconds,
        timeout_graceful_shutdown=ANSWER_SECONDS,
        h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES,
    )


def _handle_signals(server: uvicorn.Server, services: Services) -> None:
    """The first signal drains and ends, the second ends. Replaces uvicorn's own handlers."""
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    def on_signal() -> None:
        if draining:
            log(logging.WARNING, "ending at once", requests=services.num_requests)
            services.engine.cut_off()
            server.config.timeout_graceful_shutdown = HURRIED_ANSWER_SECONDS
            server.should_exit = True
        else:
            draining.append(loop.create_task(_drain(server, services)))

    for number in (signal.SIGTERM, signal.SIGINT):
        # Outside the main thread there are no signals to handle.
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(number, on_signal)


async def _drain(server: uvicorn.Server, services: Services) -> None:
    """Take nothing new, let running requests end, then stop listening."""
    seconds = services.config.drain_seconds
    log(logging.INFO, "draining", seconds=seconds, requests=services.num_requests)
    services.is_draining = True
    try:
        await services.engine.drain(seconds)
    finally:
        server.should_exit = True
