"""JSON output of `lowlat plan train` and `lowlat train --dry-run`, in bytes, seconds and FLOPs."""

from dataclasses import asdict
from typing import Any

from lowlat.plan.estimate import Estimate
from lowlat.plan.flops import TokenFlops
from lowlat.plan.memory import MemoryEstimate
from lowlat.plan.search import Neighbour, SearchResult


def flops_object(flops: TokenFlops) -> dict[str, Any]:
    """FLOPs per token."""
    return {
        "forward": flops.forward,
        "training": flops.training,
        "executed": flops.executed,
        "forward_by_part": flops.parts,
    }


def memory_object(memory: MemoryEstimate) -> dict[str, Any]:
    """Bytes on the device with the largest peak."""
    return {
        "total": memory.total,
        "by_purpose": memory.parts,
        "activations_by_tensor": memory.activations,
        "parameters_by_part": memory.parameters,
        "largest": memory.largest,
        "pipeline_rank": memory.rank,
    }


def estimate_object(found: Estimate) -> dict[str, Any]:
    """A layout with its memory, time and traffic."""
    return {
        "layout": asdict(found.job.layout),
        "micro_batches": found.job.micro_batches,
        "activation_checkpointing": found.job.activation_checkpointing,
        "precision": found.job.precision,
        "fits": found.fits,
        "memory": memory_object(found.memory),
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


def plan_object(
    main: Estimate,
    flops: TokenFlops,
    around: list[Neighbour],
    search: SearchResult | None,
    shown: int,
) -> dict[str, Any]:
    """An estimate, the effect of single changes, and the best `shown` layouts of a search."""
    plan = {
        "estimate": estimate_object(main),
        "flops_per_token": flops_object(flops),
        "changes": neighbours_object(around),
    }
    return plan if search is None else plan | {"search": search_object(search, shown)}


def search_object(search: SearchResult, shown: int) -> dict[str, Any]:
    """The best `shown` layouts."""
    return {
        "tried": search.tried,
        "failed": dict(search.failed),
        "best": [estimate_object(found) for found in search.ranked[:shown]],
    }


def neighbours_object(neighbours: list[Neighbour]) -> list[dict[str, Any]]:
    """Layouts that differ in one setting."""
    return [
        {
            "change": each.change,
            "step_seconds": None if each.found is None else each.found.time.total,
            "memory_bytes": None if each.found is None else each.found.memory.total,
            "why": each.why,
        }
        for each in neighbours
    ]
