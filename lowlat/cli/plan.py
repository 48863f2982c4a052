"""`lowlat plan train`: estimate memory, traffic and time of a training on a cluster."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowlat.cli import options
from lowlat.cli.info import find
from lowlat.cli.plan_serve import plan_serve
from lowlat.config.model import ModelConfig
from lowlat.plan.job import TrainingJob, check
from lowlat.plan.machine import H100, MACHINES, Machine
from lowlat.plan.published import PUBLISHED
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.plan.estimate import Estimate
    from lowlat.plan.flops import TokenFlops
    from lowlat.plan.search import Neighbour, SearchResult
    from lowlat.train.recipe.schema import Recipe

DEFAULT_LENGTH = 4096
DEFAULT_ROWS = 4096
TOP = 10
MOST_GB = 1e6

app = typer.Typer(
    name="plan",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def plan_group() -> None:
    """Estimate what a workload needs before it runs."""


app.command("serve")(plan_serve)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Model, job and machine of a plan."""

    name: str
    config: ModelConfig
    job: TrainingJob
    machine: Machine
    has_layout: bool
    """Whether the job has a parallel layout; otherwise layouts are searched."""
    published_hours: float | None = None
    """Device-hours per trillion tokens in the model's paper."""


@app.command("train")
def plan(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="Recipe in TOML, or any model that lowlat info accepts; deepseek-v3 includes the "
            "layout of its paper.",
        ),
    ],
    devices: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Search the parallel layouts of N devices."),
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help=f"Device type: {', '.join(MACHINES)}.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of a device, such as 80GB (1 GB = 2^30 bytes)."),
    ] = None,
    network: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Bandwidth of a device to other nodes.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help=f"Number of layouts to show, by default {TOP}."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Estimate memory, traffic, pipeline bubble and time of a training run.

    With --devices, search for the fastest parallel layouts. Recipes with GRPO are estimated on this
    machine, as by lowlat train --dry-run.
    """
    if top is not None and devices is None:
        raise UserError("--top needs --devices, which searches layouts; add it or remove --top")
    given = {"devices": devices, "machine": machine, "memory": memory, "network": network}
    if _plan_grpo(name, changes or [], given, as_json):
        return
    subject = _subject(name, changes or [])
    subject = replace(subject, machine=_machine(subject.machine, machine, memory, network))
    _report(subject, devices, top or TOP, as_json)


def _plan_grpo(name: str, changes: list[str], given: dict[str, Any], as_json: bool) -> bool:
    """Print the dry run of the recipe `name` if it has a GRPO phase, which runs on the CPU of this
    machine; returns whether it has. given: options of clusters.
    """
    if not name.endswith(".toml"):
        return False
    from lowlat.cli.inputs import recipe_checkpoint
    from lowlat.train.recipe.schema import read_recipe
    from lowlat.utils.progress import make_progress

    path = Path(name)
    recipe = read_recipe(path, changes)
    if recipe.distillation is not None or all(phase.grpo is None for phase in recipe.phase):
        return False
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{path}: grpo runs on the CPU of this machine; leave out --{option}")
    from lowlat.cli.train_dry_run import print_dry_run

    base_model = recipe_checkpoint(path, "base_model", recipe.base_model, make_progress())
    print_dry_run(recipe, path, base_model, as_json=as_json)
    return True


def _report(subject: Subject, devices: int | None, top: int, as_json: bool) -> None:
    from lowlat.plan.estimate import estimate
    from lowlat.plan.flops import token_flops
    from lowlat.plan.search import all_layouts, neighbours, search
    from lowlat.utils.progress import make_progress

    config, job = subject.config, subject.job
    own = estimate(config, job, subject.machine) if subject.has_layout else None
    found = None
    if devices is not None:
        layouts = all_layouts(config, devices, subject.machine)
        found = search(config, job, subject.machine, layouts, make_progress())
    main = own or (found.ranked[0] if found else None)
    if main is None:
        raise UserError(f"'{subject.name}' has no layout; give --devices to search one")
    flops = token_flops(config, job.sequence_length, main.job.activation_checkpointing)
    around = neighbours(config, main)
    if as_json:
        answer = {"name": subject.name} | plan_object(main, flops, around, found, top)
        print(json.dumps(answer, indent=2))
        return
    from lowlat.cli.plan_view import show

    hours = subject.published_hours
    show(subject.name, main, flops, around, found, top=top, published_hours=hours)


def plan_object(
    main: "Estimate",
    flops: "TokenFlops",
    around: "list[Neighbour]",
    search: "SearchResult | None",
    shown: int,
) -> dict[str, Any]:
    """The object of --json, in bytes, seconds and FLOPs: an estimate, the effect of single changes,
    and the best `shown` layouts of a search.
    """
    plan = {
        "estimate": _estimate(main),
        "flops_per_token": {
            "forward": flops.forward,
            "training": flops.training,
            "executed": flops.executed,
            "forward_by_part": flops.parts,
        },
        "changes": [
            {
                "change": each.change,
                "step_seconds": None if each.found is None else each.found.time.total,
                "memory_bytes": None if each.found is None else each.found.memory.total,
                "why": each.why,
            }
            for each in around
        ],
    }
    if search is not None:
        best = [_estimate(found) for found in search.ranked[:shown]]
        plan["search"] = {"tried": search.tried, "failed": dict(search.failed), "best": best}
    return plan


def _estimate(found: "Estimate") -> dict[str, Any]:
    """A layout with its memory, time and traffic."""
    memory = found.memory
    return {
        "layout": asdict(found.job.layout),
        "micro_batches": found.job.micro_batches,
        "activation_checkpointing": found.job.activation_checkpointing,
        "precision": found.job.precision,
        "fits": found.fits,
        "memory": {
            "total": memory.total,
            "by_purpose": memory.parts,
            "activations_by_tensor": memory.activations,
            "parameters_by_part": memory.parameters,
            "largest": memory.largest,
            "pipeline_rank": memory.rank,
        },
        "step_seconds": {"total": found.time.total, **asdict(found.time)},
        "bubble_share": found.bubble_share,
        "sent_bytes": {
            sent.kind: {"node": sent.node_bytes, "network": sent.network_bytes}
            for sent in found.transfers
        },
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.mfu,
        "device_hours_per_trillion_tokens": found.device_hours(1e12),
    }


def _subject(name: str, changes: list[str]) -> Subject:
    if name.endswith(".toml"):
        return _recipe(Path(name), changes)
    if changes:
        raise UserError("--set changes recipes; give a recipe instead of a model")
    config = find(name).config
    if config.is_sparse:
        raise UserError(f"'{name}' has sparse attention (DSA), which cannot be trained")
    known = PUBLISHED.get(name)
    if known is not None:
        return Subject(
            name=name,
            config=config,
            job=known.job,
            machine=known.machine,
            has_layout=True,
            published_hours=known.hours_per_trillion,
        )
    job = TrainingJob(sequence_length=DEFAULT_LENGTH, batch_size=DEFAULT_ROWS, kernels="fused")
    return Subject(name=name, config=config, job=job, machine=H100, has_layout=False)


def _recipe(path: Path, changes: list[str]) -> Subject:
    from lowlat.cli.inputs import recipe_checkpoint
    from lowlat.train.cost.dry_run import largest_job
    from lowlat.train.inputs.configs import recipe_config
    from lowlat.train.inputs.parallel_check import check_parallel
    from lowlat.train.recipe.schema import read_recipe
    from lowlat.utils.progress import make_progress

    recipe = read_recipe(path, changes)
    _check_whole(recipe, path)
    base_model = recipe_checkpoint(path, "base_model", recipe.base_model, make_progress())
    config = recipe_config(recipe, path, base_model)
    check_parallel(config, recipe, str(path))
    job = largest_job(recipe)
    try:
        check(config, job)
    except UserError as error:
        raise UserError(f"{path}: [parallel]: {error}") from error
    return Subject(name=recipe.name, config=config, job=job, machine=H100, has_layout=True)


def _check_whole(recipe: "Recipe", path: Path) -> None:
    """Raises UserError if the recipe does not train all weights with the cross-entropy loss."""
    for key, is_there in (
        ("lora", recipe.lora is not None),
        ("trainable", recipe.trainable != "all"),
        ("distillation", recipe.distillation is not None),
    ):
        if is_there:
            raise UserError(
                f"{path}: {key}: plan only estimates the training of all weights; use lowlat train "
                f"{path} --dry-run"
            )


def _machine(
    default: Machine, name: str | None, memory: str | None, network: float | None
) -> Machine:
    if name is not None and name not in MACHINES:
        raise UserError(f"--machine '{name}' is unknown; choose one of {', '.join(MACHINES)}")
    machine = default if name is None else MACHINES[name]
    if memory is not None:
        machine = replace(machine, memory_bytes=parse_memory(memory))
        if machine.usable_bytes <= 0:
            reserve = machine.reserve_bytes / 1e9
            raise UserError(f"--memory '{memory}': {reserve:g} GB of it are reserved; give more")
    if network is not None:
        if not 0 < network < float("inf"):
            raise UserError(f"--network {network}: give gigabytes per second, above 0")
        machine = replace(machine, network_bandwidth=network * 1e9)
    return machine


def parse_memory(text: str) -> int:
    """Bytes of '80GB', '80 GiB' or '80', in units of 2^30 bytes. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if match is None or not 0 < float(match[1]) <= MOST_GB:
        raise UserError(f"--memory '{text}': write a size in gigabytes, such as 80GB")
    return int(float(match[1]) * 2**30)
