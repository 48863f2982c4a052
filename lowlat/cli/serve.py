"""`lowlat serve`: command-line options of the HTTP server."""

import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowlat.cli import options
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.serve.config import ServeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Address, authentication and names of a server."""

    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; any but a loopback address requires --api-key-file."
        ),
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8000
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File of API keys, one per line; every route but /health then requires one."
        ),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name to accept in requests, such as that of a proxy; may be repeated."
        ),
    ] = None
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin of web pages that may call the API (CORS), such as https://example.org;"
            " may be repeated."
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Model name in the API; default: MODEL, or the last part of a path."),
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitOptions:
    """Limits of requests, of the queue and of a shutdown."""

    max_context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Maximum tokens of prompt and output together; default: the model's maximum.",
        ),
    ] = None
    max_queue: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum number of requests waiting for their first step; more get status 429.",
        ),
    ] = 256
    request_timeout: Annotated[
        float | None, typer.Option(help="Maximum seconds per request; then status 408.")
    ] = None
    drain_seconds: Annotated[
        float, typer.Option(help="Seconds for running requests to finish after SIGTERM or Ctrl-C.")
    ] = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Speculation and KV cache of the engine."""

    speculate: Annotated[
        bool,
        typer.Option(
            help="Speculative decoding (MTP or prompt lookup) where it pays; changes no token."
        ),
    ] = True
    cache_memory: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="GiB for the KV cache; default: most of the memory left by the weights."
        ),
    ] = None
    prefix_cache_dir: options.PrefixCacheDir = None
    prefix_cache_disk: options.PrefixCacheDisk = None


@options.with_option_groups
def serve(
    *,
    model: options.Model = options.DEFAULT_MODEL,
    server: Annotated[ServerOptions, "Server"],
    limits: Annotated[LimitOptions, "Limits"],
    engine: Annotated[EngineOptions, "Machine"],
    machine: options.Machine,
) -> None:
    """Serve a model over HTTP: OpenAI's API under /v1, a chat page at /, metrics at /metrics."""
    _check_extra()
    from lowlat.cli.inputs import load_model
    from lowlat.serve.async_engine import AsyncEngine
    from lowlat.serve.http.logs import configure, log
    from lowlat.serve.run import open_socket, run, url_of

    if server.served_model_name == "":
        raise UserError("--served-model-name is empty; set a name, or leave the option out")
    max_cache_bytes = _cache_bytes(engine.cache_memory, machine.device)
    disk = options.disk_cache(engine.prefix_cache_dir, engine.prefix_cache_disk)
    config = _config(model, server, limits)
    # Before the model is fetched and loaded, so that a port in use fails at once.
    with open_socket(config) as listener:
        loaded = load_model(
            model,
            **asdict(machine),
            context=limits.max_context,
            max_cache_bytes=max_cache_bytes,
            **disk,
            speculates=engine.speculate,
        )
        configure()
        if _is_exposed(server.api_key_file):
            log(
                logging.WARNING,
                "other users can read or write the file of --api-key-file; run chmod 600 on it",
            )
        greeting = f"lowlat serves {config.model_name} on {url_of(listener)} (Ctrl-C ends it)"
        async_engine = AsyncEngine(loaded, max_queue=limits.max_queue)
        run(async_engine, config, listener, on_ready=lambda: typer.echo(greeting))


def _config(model: str, server: ServerOptions, limits: LimitOptions) -> "ServeConfig":
    """Raises UserError for a value out of range, and for a key file that cannot be read."""
    from lowlat.serve.config import ServeConfig, read_keys

    return ServeConfig(
        host=server.host,
        port=server.port,
        model_name=server.served_model_name or _served_name(model),
        api_keys=() if server.api_key_file is None else read_keys(server.api_key_file),
        allowed_hosts=tuple(server.allowed_host or ()),
        allowed_origins=tuple(server.allowed_origin or ()),
        request_seconds=limits.request_timeout,
        drain_seconds=limits.drain_seconds,
    )


def _is_exposed(keys: Path | None) -> bool:
    """Whether other users can read or write the file of keys, which may have been deleted since."""
    from lowlat.serve.config import is_exposed

    return keys is not None and keys.exists() and is_exposed(keys)


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
    name = Path(model).resolve().name if Path(model).exists() else model
    return os.fsencode(name).decode("utf-8", "replace")  # paths need not be UTF-8, JSON must
