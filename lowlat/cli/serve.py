"""`lowlat serve`: command-line options of the HTTP server."""

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
            help="Address to listen on; any but a loopback address requires --api-key-file.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port; 0 picks a free one.", rich_help_panel=_SERVER_PANEL)
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File of API keys, one per line; every route but /health then requires one.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name to accept in requests, such as that of a proxy; may be repeated.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="Model name in the API; default: MODEL, or the last part of a path.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Maximum tokens of prompt and output together; default: the model's maximum.",
            rich_help_panel=_LIMITS_PANEL,
        ),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum number of requests waiting for their first step; more get status 429.",
            rich_help_panel=_LIMITS_PANEL,
        ),
    ] = 256,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            help="Maximum seconds per request; then status 408.",
            rich_help_panel=_LIMITS_PANEL,
        ),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(
            help="Seconds for running requests to finish after SIGTERM or Ctrl-C.",
            rich_help_panel=_LIMITS_PANEL,
        ),
    ] = 30.0,
    speculate: Annotated[
        bool,
        typer.Option(
            help="Speculative decoding (MTP or prompt lookup) where it pays; changes no token.",
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
            help="GiB for the KV cache; default: most of the memory left by the weights.",
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

    if served_model_name == "":
        raise UserError("--served-model-name is empty; set a name, or leave the option out")
    max_cache_bytes = _cache_bytes(cache_memory, device)
    config = ServeConfig(
        host=host,
        port=port,
        model_name=served_model_name or _served_name(model),
        api_keys=() if api_key_file is None else read_keys(api_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        request_seconds=request_timeout,
        drain_seconds=drain_seconds,
    )
    # Before the model is fetched and loaded, so that a port in use fails at once.
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
    """Raise UserError if the optional packages of the server are not installed."""
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
    """--cache-memory in bytes. Raises UserError if the device has less memory."""
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
    """The model's name without its folders, which clients must not see."""
    return Path(model).resolve().name if Path(model).exists() else model
