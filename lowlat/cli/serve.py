"""`lowlat serve`: command-line options of the HTTP server, and what it serves."""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowlat.cli import options
from lowlat.cli.serve_models import (
    ModelTable,
    apply_config,
    check_names,
    config_tables,
    parse_lora,
    parse_model,
)
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.config.serving_layout import EPLBConfig
    from lowlat.serve.async_engine import AsyncEngine
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
            help="File of API keys, one per line; all routes but /health and /ready then require"
            " one."
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
class ModelOptions:
    """Several models, which are loaded on demand."""

    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODEL[@KEY=VALUE,...]",
            help="A model with its name in the API; may be repeated. Keys: alias, dtype, cache,"
            " max_context, cache_memory, speculate, lora.NAME. Several are loaded on demand.",
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="A LoRA adapter of the model in PEFT's layout, with its name in the API (vLLM:"
            " --lora-modules); may be repeated.",
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="File with options as keys and models as [[model]] tables.",
            callback=apply_config,
            is_eager=True,
        ),
    ] = None
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GiB for weights and KV caches of several models; default: the machine's.",
        ),
    ] = None
    unload_after: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which an idle model is unloaded; default: when another needs its"
            " memory."
        ),
    ] = None
    load_timeout: Annotated[
        float,
        typer.Option(help="Seconds that a request waits for its model to load; then status 503."),
    ] = 120.0


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
    enable_eplb: Annotated[
        bool,
        typer.Option(
            "--enable-eplb",
            help="Place the experts of --parallel expert=E by their measured loads (EPLB) while"
            " serving; changes no token.",
        ),
    ] = False
    num_redundant_experts: Annotated[
        int, typer.Option(min=0, help="Replicas of experts per layer for --enable-eplb.")
    ] = 0
    eplb_step_interval: Annotated[
        int, typer.Option(min=1, help="Steps between two placements for --enable-eplb.")
    ] = 3000
    cache_memory: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="GiB for the KV cache; default: 80 % of the memory the weights leave."
        ),
    ] = None
    prefix_cache_dir: options.PrefixCacheDir = None
    prefix_cache_disk: options.PrefixCacheDisk = None


@options.with_option_groups
def serve(
    *,
    models: options.Models = None,
    several: Annotated[ModelOptions, "Models"],
    server: Annotated[ServerOptions, "Server"],
    limits: Annotated[LimitOptions, "Limits"],
    engine: Annotated[EngineOptions, "Machine"],
    parallel: options.Parallel = None,
    machine: options.Machine,
) -> None:
    """Serve models over HTTP: OpenAI's API under /v1, a chat page at /, metrics at /metrics.

    A single model loads at start; several load on demand.
    """
    _check_extra()
    from lowlat.cli.launch import one_process_per_node
    from lowlat.cli.serve_on_demand import Machine, served_models
    from lowlat.serve.http.logs import configure, log
    from lowlat.serve.run import open_socket, run, url_of
    from lowlat.utils.process_group import is_follower, quiet_followers

    parallel = one_process_per_node(parallel, drain_seconds=limits.drain_seconds)
    with quiet_followers():
        tables = _tables(models or [], several, server.served_model_name)
        is_one = len(tables) == 1 and several.unload_after is None
        if is_one and several.memory is not None:
            raise UserError("--memory is for several models; limit one by --cache-memory")
        tables = [_with_defaults(table, limits, engine, machine) for table in tables]
        disk = options.disk_cache(engine.prefix_cache_dir, engine.prefix_cache_disk)
        config = _config(tables, is_one, server, limits, several, machine.device)
        if parallel is not None and not is_one:
            raise UserError("--parallel divides one model; serve several ones without it")
        eplb = _eplb(engine, parallel)
    if is_follower():
        _load_one(tables[0], machine, limits.max_queue, disk, parallel, eplb)
        return
    # Before models are fetched and loaded, so that a port in use fails at once.
    with open_socket(config) as listener:
        if is_one:
            served = _load_one(tables[0], machine, limits.max_queue, disk, parallel, eplb)
        else:
            shared = Machine(
                device=machine.device,
                threads=machine.threads,
                memory=config.memory_bytes or 0,
                disk=disk,
            )
            served = served_models(tables, shared, max_queue=limits.max_queue)
        configure()
        if _is_exposed(server.api_key_file):
            log(
                logging.WARNING,
                "other users can read or write the file of --api-key-file; run chmod 600 on it",
            )
        names = ", ".join(table.name for table in tables)
        greeting = f"lowlat serves {names} on {url_of(listener)} (Ctrl-C ends it)"
        run(served, config, listener, on_ready=lambda: typer.echo(greeting))


def _tables(
    models: Sequence[str], several: ModelOptions, served_name: str | None
) -> list[ModelTable]:
    """The models of the command line and of the file, by default one. Raises UserError."""
    if served_name == "":
        raise UserError("--served-model-name is empty; set a name, or leave the option out")
    named = [*map(parse_model, several.model or []), *config_tables(several.config)]
    if not models and not named:
        models = [options.DEFAULT_MODEL]
    tables = [*(ModelTable(name=_served_name(model), path=model) for model in models), *named]
    if served_name is not None:
        if len(tables) > 1:
            raise UserError("--served-model-name names one model; use --model NAME=MODEL")
        tables = [tables[0].model_copy(update={"name": served_name})]
    if adapters := parse_lora(several.lora or []):
        if len(tables) > 1:
            raise UserError("--lora adds to one model; use --model NAME=MODEL@lora.NAME=FOLDER")
        tables = [tables[0].model_copy(update={"lora": tables[0].lora | adapters})]
    check_names(tables)
    return tables


def _with_defaults(
    table: ModelTable, limits: LimitOptions, engine: EngineOptions, machine: options.MachineOptions
) -> ModelTable:
    _cache_bytes(engine.cache_memory, machine.device)
    return table.with_defaults(
        dtype=machine.dtype,
        cache=machine.cache,
        max_context=limits.max_context,
        cache_memory=engine.cache_memory,
        speculate=engine.speculate,
    )


def _eplb(engine: EngineOptions, parallel: str | None) -> "EPLBConfig | None":
    """Raises UserError for options of EPLB without it, and for EPLB of an undivided model."""
    from lowlat.config.serving_layout import EPLBConfig

    config = EPLBConfig(
        num_redundant_experts=engine.num_redundant_experts,
        step_interval=engine.eplb_step_interval,
    )
    if not engine.enable_eplb and config != EPLBConfig():
        raise UserError(
            "--num-redundant-experts and --eplb-step-interval are for --enable-eplb; add it"
        )
    if engine.enable_eplb and parallel is None:
        raise UserError("--enable-eplb places the experts of --parallel expert=E; give both")
    return config if engine.enable_eplb else None


def _load_one(
    table: ModelTable,
    machine: options.MachineOptions,
    max_queue: int,
    disk: options.DiskCacheArguments,
    parallel: str | None,
    eplb: "EPLBConfig | None",
) -> "AsyncEngine":
    """The engine of a single model, which is loaded."""
    from lowlat.cli.inputs import load_model
    from lowlat.serve.async_engine import AsyncEngine

    model = load_model(
        table.path,
        threads=machine.threads,
        device=machine.device,
        dtype=table.dtype or machine.dtype,
        cache=table.cache or machine.cache,
        context=table.max_context,
        max_cache_bytes=_cache_bytes(table.cache_memory, machine.device),
        speculates=table.speculate is not False,
        lora=table.lora,
        parallel=parallel,
        eplb=eplb,
        **disk,
    )
    return AsyncEngine(model, max_queue=max_queue)


def _config(
    tables: Sequence[ModelTable],
    is_one: bool,
    server: ServerOptions,
    limits: LimitOptions,
    several: ModelOptions,
    device: str,
) -> "ServeConfig":
    """Raises UserError for a value out of range, and for a key file that cannot be read."""
    from lowlat.cli.serve_on_demand import memory_bytes
    from lowlat.serve.config import ServeConfig, read_keys

    return ServeConfig(
        host=server.host,
        port=server.port,
        model_name=tables[0].name if is_one else None,
        model_aliases=tuple(tables[0].aliases) if is_one else (),
        memory_bytes=None if is_one else memory_bytes(several.memory, device),
        load_seconds=several.load_timeout,
        unload_seconds=several.unload_after,
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
