"""JSON output of `lowlat plan train`, in bytes, seconds and FLOPs."""

from dataclasses import asdict
from typing import Any

from lowlat.plan.estimate import Estimate
from lowlat.plan.flops import TokenFlops
from lowlat.plan.search import Neighbour, SearchResult


def plan_object(
    main: Estimate,
    flops: TokenFlops,
    around: list[Neighbour],
    search: SearchResult | None,
    shown: int,
) -> dict[str, Any]:
    """An estimate, the effect of single changes, and the best `shown` layouts of a search."""
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


def _estimate(found: Estimate) -> dict[str, Any]:
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
