"""`--dry-run` of a study: variants, parameters and estimated time."""

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lowlat.config.attention import short_name
from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.parameter_count import count_parameters
from lowlat.data.dataset import TokenizedDataset
from lowlat.train.metrics.formatting import clock, count
from lowlat.utils.progress import Progress
from lowlat_lab.study.estimate import estimate
from lowlat_lab.study.plan import StudyPlan, config_of


def describe(plan: StudyPlan, data: TokenizedDataset, progress: Progress, *, as_json: bool) -> None:
    """Print the plan; the time is estimated from a few steps of every variant."""
    found = estimate(plan, progress)
    variants: list[dict[str, Any]] = [
        {
            **variant_facts(plan, place, data.vocab_size),
            "step_seconds": found.step_seconds[variant.name],
        }
        for place, variant in enumerate(plan.variants)
    ]
    if as_json:
        facts = {"steps": plan.steps, "tokens": plan.tokens, "seeds": list(plan.seeds)}
        print(json.dumps(facts | {"variants": variants, "seconds": found.seconds}, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "attention", "parameters", "of layers", "MLP", "cache", "s/step"):
        table.add_column(heading, justify="left" if heading in ("", "attention") else "right")
    for variant in variants:
        table.add_row(
            variant["label"],
            variant["attention"],
            count(variant["parameters"]),
            f"{variant['difference']:+.2%}",
            str(variant["intermediate_size"]),
            str(variant["cache_elements"]),
            f"{variant['step_seconds']:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{len(plan.runs)} runs of {plan.steps:,} steps, {count(plan.tokens)} tokens each: about "
        f"{clock(found.seconds)} at the current speed",
        highlight=False,
    )


def variant_facts(plan: StudyPlan, place: int, vocab_size: int) -> dict[str, Any]:
    """Sizes of a variant; difference: of non-embedding parameters from the baseline's."""
    variant = plan.variants[place]
    config, base = (config_of(each.model, vocab_size) for each in (variant, plan.baseline))
    own, other = count_parameters(config), count_parameters(base)
    return {
        "name": variant.name,
        "label": variant.label,
        "attention": short_name(config.attention),
        "parameters": own.total,
        "mtp_parameters": own.mtp,
        "difference": (own.total - own.embedding) / (other.total - other.embedding) - 1,
        "intermediate_size": config.intermediate_size,
        "cache_elements": kv_cache_size(config).elements_per_token_layer,
    }
