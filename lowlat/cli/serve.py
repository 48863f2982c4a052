"""`lowlat serve`: an HTTP server with OpenAI's API and a chat page.

Owns the options; listening and ending are `serve.run`'s.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from lowlat.cli import options
from lowlat.utils.errors import UserError

_SERVER_PANEL = "Server"
_LIMITS_PANEL = "Limits"
_MACHINE_PANEL = "Machine"


def serve(
    model: options.Model = options.DEFAULT_MODEL,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; any but a loopback address needs --api-key-file.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port; 0 takes a free one.", rich_help_panel=_SERVER_PANEL)
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File of API keys, one a line; every route but /health then needs one.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name that requests may be addressed to, such as a proxy's; may be repeated.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name clients ask for; the default is MODEL's (of a path, the last part).",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Most tokens of prompt and answer together; the default is all the model allows.",
            rich_help_panel=_LIMITS_PANEL,
        ),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(
            min=1,
            help="Requests that may wait for their first step; more get status 429.",
            rich_help_panel=_LIMITS_PANEL,
        ),
    ] = 256,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds a request may take; it then gets status 408.",
            rich_help_panel=_LIMITS_PANEL,
        ),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(
            help="Seconds running requests may go on after SIGTERM or Ctrl-C.",
            rich_help_panel=_LIMITS_PANEL,
        ),
    ] = 30.0,
    speculate: Annotated[
        bool,
        typer.Option(
            help="Verify guesses at several tokens in a step where that pays; changes no token.",
            rich_help_panel=_MACHINE_PANEL,
        ),
    ] = True,
    device: options.Device = options.DEFAULT_DEVICE,
    dtype: options.Dtype = options.DEFAULT_DTYPE,
    cache: options.Cache = options.DEFAULT_CACHE,
    cache_memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GiB the cache may take; the default is most of the memory the weights leave.",
            rich_help_panel=_MACHINE_PANEL,
        ),
    ] = None,
    threads: options.Threads = None,
) -> None:
    """Serve a model over HTTP: OpenAI's API under /v1, a chat page at /, metrics at /metrics."""
    _check_extra()
    from lowlat.cli.inputs import load_model
    from lowlat.serve.async_engine import AsyncEngine
    from lowlat.serve.config import ServeConfig, read_keys
    from lowlat.serve.http.logs import configure
    from lowlat.serve.run import open_socket, run, url_of

    if name == "":
        raise UserError("--name is empty; give a name, or leave the option out")
    max_cache_bytes = _cache_bytes(cache_memory, device)
    config = ServeConfig(
        host=host,
        port=port,
        model_name=name or _served_name(model),
        api_keys=() if api_key_file is None else read_keys(api_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        request_seconds=request_timeout,
        drain_seconds=drain_seconds,
    )
    # Before a model is fetched or loaded, so that a taken port is known at once.
    with open_socket(config) as listener:
        loaded = load_model(
            model,
            dtype=dtype,
            cache=cache,
            device=device,
            threads=threads,
            context=max_context,
            max_cache_bytes=max_cache_bytes,
            speculates=speculate,
        )
        configure()
        greeting = f"lowlat serves {config.model_name} on {url_of(listener)} (Ctrl-C ends it)"
        engine = AsyncEngine(loaded, max_queue=max_queue)
        run(engine, config, listener, on_ready=lambda: typer.echo(greeting))


def _check_extra() -> None:
    """Raises UserError where the packages a server needs are not installed."""
    try:
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"the server needs the package {error.name}; install it with: "
            "pip install 'lowlat[serve]'"
        ) from error


def _cache_bytes(gib: float | None, device: str) -> int | Literal["auto"]:
    """What --cache-memory allows. Raises UserError where the device has less."""
    from lowlat.engine.cache_size import check_cache_bytes
    from lowlat.utils.device import parse_device

    if gib is None:
        return "auto"
    size = gib * 2**30
    if not math.isfinite(size):
        raise UserError(f"--cache-memory must be a number of GiB, got {gib}")
    check_cache_bytes(int(size), parse_device(device), f"--cache-memory {gib:g}")
    return int(size)


def _served_name(model: str) -> str:
    """`model` without the folders it lies in, which are no business of clients."""
    return Path(model).resolve().name if Path(model).exists() else model
