"""Run the server: socket, uvicorn, signal handlers, graceful shutdown (drain).

Also sets the limit on open files. The application is in `serve.app`.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable, Sequence

import uvicorn

from lowlat.serve.app import build_app, make_state
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.http.connection import connection_class
from lowlat.serve.http.connection_pool import ConnectionPool
from lowlat.serve.http.logs import log
from lowlat.serve.protocol import limits
from lowlat.serve.served_model import ServedModel
from lowlat.serve.state import ServerState
from lowlat.utils.errors import UserError

BACKLOG = 2048
SHUTDOWN_SECONDS = 5
"""Seconds for sending buffered responses after generation has stopped."""
FORCED_SHUTDOWN_SECONDS = 1
"""The same after a second signal."""
SPARE_DESCRIPTORS = 256
"""File descriptors reserved for everything but client connections."""


def open_socket(config: ServeConfig) -> socket.socket:
    """A socket bound to the config's address. It does not listen yet, so clients are refused.

    Raises UserError if the address is in use or does not belong to this machine.
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
    """The server's URL for clients on this machine."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    models: AsyncEngine | Sequence[ServedModel],
    config: ServeConfig,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal aborts running requests.

    `models`: see `make_state`. Calls `on_ready` once the server accepts connections. Raises
    UserError if another program has begun to listen on the address since the socket was bound.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(config, error) from error
    asyncio.run(_run(models, config, listener, on_ready))


async def _run(
    models: AsyncEngine | Sequence[ServedModel],
    config: ServeConfig,
    listener: socket.socket,
    on_ready: Callable[[], None],
) -> None:
    state = make_state(models, config)
    server = uvicorn.Server(_uvicorn_config(state))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        # The objects loaded so far live until the end. Freezing them spares every full garbage
        # collection a scan that stalls all requests for about 0.2 s.
        gc.collect()
        gc.freeze()
        _handle_signals(server, state)
        for model in state.models.models:
            model.warn_of_batches()
        names = ", ".join(model.name for model in state.models.models)
        log(logging.INFO, "ready", model=names, url=url_of(listener))
        on_ready()
    try:
        await serving
    finally:
        # So that everything is freed at the end of the program.
        gc.unfreeze()


def _connection_limit(connections: int) -> int:
    """`connections`, or fewer where the limit on open files (RLIMIT_NOFILE) allows fewer."""
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


def _uvicorn_config(state: ServerState) -> uvicorn.Config:
    config = state.config
    pool = ConnectionPool(_connection_limit(config.max_connections), state.bodies)
    return uvicorn.Config(
        build_app(state),
        http=connection_class(config, pool),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # X-Forwarded-* headers of clients are not trusted.
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=config.keep_alive_seconds,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES,
    )


def _handle_signals(server: uvicorn.Server, state: ServerState) -> None:
    """The first signal drains, the second aborts. Replaces uvicorn's own handlers."""
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    def on_signal() -> None:
        if draining:
            log(logging.WARNING, "aborting running requests", requests=state.num_requests)
            state.models.cut_off()
            server.config.timeout_graceful_shutdown = FORCED_SHUTDOWN_SECONDS
            server.should_exit = True
        else:
            draining.append(loop.create_task(_drain(server, state)))

    for number in (signal.SIGTERM, signal.SIGINT):
        # Signal handlers can only be set in the main thread.
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(number, on_signal)


async def _drain(server: uvicorn.Server, state: ServerState) -> None:
    """Refuse new requests, let running ones finish, then stop listening."""
    seconds = state.config.drain_seconds
    log(logging.INFO, "draining", seconds=seconds, requests=state.num_requests)
    state.is_draining = True
    try:
        await state.models.drain(seconds)
    finally:
        server.should_exit = True
