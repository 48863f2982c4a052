"""`lowlat plan serve`: rank parallel layouts of a cluster by memory, throughput and time to first
token.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowlat.cli import options
from lowlat.cli.served_model import DTYPES, ServedModel, served_model
from lowlat.config.serving_layout import AUTO, ServingLayout
from lowlat.plan.serving.layout import check_layout
from lowlat.plan.serving.machines import (
    HERE,
    MACHINES,
    Cluster,
    ServingMachine,
    parse_cluster,
    split_count,
)
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.plan.serving.estimate import ServingEstimate, ServingJob
    from lowlat.plan.serving.search import RankedLayouts

TOP = 10
MOST = 10**8
MOST_REDUNDANT = 4096
MOST_LINK = 10**6
"""Largest --network, in GB/s, and --latency, in microseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterOptions:
    """Machines of the cluster and the parallel layout."""

    machine: Annotated[
        str,
        typer.Option(
            metavar="[Nx]NAME",
            help=f"N servers of two sockets, or N GPUs: {', '.join(MACHINES)}, a .toml file, or "
            f"{HERE} (this machine, measured).",
        ),
    ]
    network: Annotated[
        float | None,
        typer.Option(metavar="GB/S", help="Bandwidth of a device to other machines."),
    ] = None
    latency: Annotated[
        float | None,
        typer.Option(metavar="US", help="Microseconds of a message to another machine."),
    ] = None
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS=N,...",
            help="Only this layout, such as tensor=2,pipeline=2,expert=4; by default all.",
        ),
    ] = None
    data_parallel_attention: Annotated[
        bool,
        typer.Option(
            "--data-parallel-attention",
            help="Data-parallel attention: the ranks of a stage divide the users, as in DeepSeek's "
            "deployment. lowlat serve does not support it.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """Load of the servers: users, context, prompt length."""

    context: Annotated[int, typer.Option(metavar="N", help="Tokens in the KV cache per user.")]
    users: Annotated[
        int, typer.Option(metavar="N", help="Concurrent users (the batch of a decode step).")
    ] = 1
    prompt: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Prompt length for time to first token; default: the context."
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Weights: {', '.join(DTYPES)}, a GGUF type such as Q4_K, or auto (as stored; a "
            "preset's as released)."
        ),
    ] = "auto"
    cache: Annotated[str, typer.Option(help="KV cache: bf16 or int8.")] = "bf16"
    expert_loads: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measured loads of experts, from lowlat eval --expert-loads; by default all are "
            "equally likely.",
        ),
    ] = None
    redundant_experts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Place experts and N replicas per layer by their loads (EPLB); by default experts "
            "are divided by number.",
        ),
    ] = None


@options.with_option_groups
def plan_serve(
    *,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Any model that lowlat info accepts, such as a preset."
        ),
    ],
    cluster: ClusterOptions,
    load: LoadOptions,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Number of layouts to show.")] = TOP,
    as_json: options.Json = False,
) -> None:
    """Memory, throughput and time to first token of serving MODEL, by parallel layout.

    Layouts are ranked by decoded tokens per second of all users. For those that do not fit, the
    missing memory is printed.
    """
    from lowlat.plan.serving.search import all_layouts, rank_layouts

    _check_load(load)
    links = _links(cluster)
    served = served_model(model, load.dtype)
    layout = _layout(served, cluster, load)
    job = _job(served, load, cluster)
    machines = _cluster(cluster, served, load, layout)
    machines = replace(machines, machine=replace(machines.machine, **links))
    possible = all_layouts(served.config, machines) if layout is None else [layout]
    layouts = [each for each in possible if _divides(served, load, each)]
    ranked = rank_layouts(served.config, job, machines, layouts)
    left_out = len(possible) - len(layouts)
    if as_json:
        found = plan_object(served, job, machines, ranked, top)
        print(json.dumps(found | {"left_out": left_out}, indent=2))
        return
    from lowlat.cli.plan_serve_view import show

    show(served, job, machines, ranked, top=top, left_out=left_out)


def plan_object(
    served: ServedModel,
    job: "ServingJob",
    machines: Cluster,
    ranked: "RankedLayouts",
    top: int,
) -> dict[str, Any]:
    """The object of --json, in bytes and seconds."""
    return {
        "model": served.name,
        "weights": {"dtype": served.stored, "bytes": served.weights.total(served.config)},
        "machine": {"name": machines.machine.name, "devices": machines.devices},
        "users": job.users,
        "context": job.context,
        "prompt": job.prompt,
        "layouts": [_estimate(found) for found in ranked.fitting[:top]],
        "too_large": [_estimate(found) for found in ranked.too_large[:top]],
    }


def _estimate(found: "ServingEstimate") -> dict[str, Any]:
    return {
        "layout": asdict(found.layout),
        "replicas": found.replicas,
        "memory": {"total": found.total_bytes, "by_purpose": found.memory},
        "missing_bytes": found.missing_bytes,
        "tokens_per_second": found.tokens_per_second,
        "tokens_per_second_per_user": found.per_user,
        "first_token_seconds": found.first_token,
        "decode_step_seconds": {"total": found.decode.total, **_seconds(found)},
        "limit": found.decode.limit,
        "sent_bytes_per_token": found.sent_bytes,
        "messages_per_step": found.messages,
        "expert_balance": found.balance and found.balance._asdict(),
    }


def _seconds(found: "ServingEstimate") -> dict[str, float]:
    """Seconds of a decode step of the slowest stage by part."""
    parts = found.decode
    return {
        "weights": parts.weights,
        "attention": parts.attention,
        "messages": parts.messages,
        "overhead": parts.overhead,
    }


def _check_load(load: LoadOptions) -> None:
    for option, value in (
        ("--context", load.context),
        ("--users", load.users),
        ("--prompt", load.prompt),
    ):
        if value is not None and not 1 <= value <= MOST:
            raise UserError(f"{option} {value}: give a number from 1 to {MOST:,}")
    if load.redundant_experts is not None:
        if load.expert_loads is None:
            raise UserError("--redundant-experts needs --expert-loads FILE, by which it places")
        if not 0 <= load.redundant_experts <= MOST_REDUNDANT:
            raise UserError(
                f"--redundant-experts {load.redundant_experts}: give a number from 0 to "
                f"{MOST_REDUNDANT:,}"
            )
    if load.cache not in ("bf16", "int8"):
        raise UserError(f"--cache '{load.cache}' is unknown; choose bf16 or int8")


def _job(served: ServedModel, load: LoadOptions, cluster: ClusterOptions) -> "ServingJob":
    from lowlat.plan.serving.estimate import ServingJob

    limit = served.config.max_position_embeddings
    prompt = load.context if load.prompt is None else load.prompt
    for option, tokens in (("--context", load.context), ("--prompt", prompt)):
        if tokens > limit:
            raise UserError(
                f"{option} {tokens:,}: the model's max_position_embeddings is {limit:,}; give less"
            )
    loads = None
    if load.expert_loads is not None:
        from lowlat.plan.serving.expert_load import read_loads

        loads = read_loads(load.expert_loads, served.config)
    return ServingJob(
        weights=served.weights,
        dtype=served.dtype,
        users=load.users,
        context=load.context,
        prompt=prompt,
        cache=load.cache,
        loads=loads,
        redundant_experts=load.redundant_experts,
        is_data_parallel=cluster.data_parallel_attention,
    )


def _layout(
    served: ServedModel, cluster: ClusterOptions, load: LoadOptions
) -> ServingLayout | None:
    """The layout of --parallel. Raises UserError if it does not divide the model."""
    if cluster.parallel is None:
        return None
    layout = ServingLayout.parse(cluster.parallel)
    if layout.prefill:
        raise UserError(
            f"--parallel {layout}: the plan is of one group of processes; leave out prefill"
        )
    check_layout(served.config, layout)
    if not _divides(served, load, layout):
        ranks, number = layout.stage_size, load.redundant_experts or 0
        assert served.config.moe is not None
        more = -(served.config.moe.n_routed_experts + number) % ranks
        raise UserError(
            f"--redundant-experts {number}: the {ranks} ranks of a stage of --parallel {layout} do "
            f"not divide {served.config.moe.n_routed_experts} experts and {number} replicas; give "
            f"{number + more}"
        )
    return layout


def _divides(served: ServedModel, load: LoadOptions, layout: ServingLayout) -> bool:
    """Whether the ranks of a stage have equally many experts and replicas."""
    if served.config.moe is None:
        return True
    replicas = served.config.moe.n_routed_experts + (load.redundant_experts or 0)
    return replicas % layout.stage_size == 0


def _cluster(
    cluster: ClusterOptions, served: ServedModel, load: LoadOptions, layout: ServingLayout | None
) -> Cluster:
    """The machines, with enough devices for `layout`. Raises UserError."""
    count, name = split_count(cluster.machine)
    if name != HERE:
        machines = parse_cluster(cluster.machine)
        _check_devices(layout, machines.devices, str(machines))
        return machines
    from lowlat.utils.process_group import is_launched, started_processes
    from lowlat.utils.topology import machine_topology

    # before the measurement, which takes seconds
    devices = started_processes() if is_launched() else len(machine_topology().nodes)
    _check_devices(layout, count * devices, f"{count} x {HERE}")
    return parse_cluster(cluster.machine, _measure_here(served, load, devices))


def _measure_here(served: ServedModel, load: LoadOptions, devices: int) -> ServingMachine:
    """This machine, measured by a process per device. Returns in process 0; the others exit."""
    from lowlat.bench.here import measure_here
    from lowlat.cli.inputs import process_progress, process_threads
    from lowlat.cli.launch import one_process_per_node
    from lowlat.ops import native
    from lowlat.utils.process_group import join_group

    option = f"--machine {HERE}"
    prompt = load.context if load.prompt is None else load.prompt
    job = (served.config, served.measured, load.cache, prompt)
    if devices == 1:
        return measure_here(*job, process_progress())
    if not native.available():
        raise UserError(f"{option}: {native.reason()}; the {devices} processes need the kernels")
    one_process_per_node(AUTO, option=option)
    threads = process_threads(AUTO, None)
    assert threads is not None
    native.use_threads(threads)
    group = join_group(devices, option)
    with group.reporting_once():
        here = measure_here(*job, process_progress(), group)
    group.leave()
    if not group.is_leader:
        raise SystemExit(0)
    return here


def _check_devices(layout: ServingLayout | None, devices: int, name: str) -> None:
    if layout is not None and layout.processes > devices:
        raise UserError(
            f"--parallel {layout}: needs {layout.processes} devices, but {name} has {devices}; "
            "give more machines"
        )


def _links(cluster: ClusterOptions) -> dict[str, float]:
    """Fields of the machine that --network and --latency change. Raises UserError."""
    changes: dict[str, float] = {}
    for option, value, field, unit in (
        ("--network", cluster.network, "network_bandwidth", 1e9),
        ("--latency", cluster.latency, "network_latency", 1e-6),
    ):
        if value is None:
            continue
        if not 0 < value <= MOST_LINK:
            raise UserError(f"{option} {value:g}: give a number above 0, up to {MOST_LINK:,}")
        changes[field] = value * unit
    return changes
