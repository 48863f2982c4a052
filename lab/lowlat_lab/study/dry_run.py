"""`--dry-run` of a study: arms, parameters and time, nothing kept. Owns the output."""

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lowlat.config.attention_summary import short_name
from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.parameter_count import count_parameters
from lowlat.data.dataset import TokenizedDataset
from lowlat.train.metrics.formatting import clock, count
from lowlat.utils.progress import Progress
from lowlat_lab.study.estimate import estimate
from lowlat_lab.study.plan import Plan, config_of


def describe(plan: Plan, data: TokenizedDataset, progress: Progress, *, as_json: bool) -> None:
    """Print what the study would be; the time is that of a few steps of every arm, tried now."""
    found = estimate(plan, progress)
    arms: list[dict[str, Any]] = [
        {**arm_facts(plan, place, data.vocab_size), "step_seconds": found.step_seconds[arm.name]}
        for place, arm in enumerate(plan.arms)
    ]
    if as_json:
        facts = {"steps": plan.steps, "tokens": plan.tokens, "seeds": list(plan.seeds)}
        print(json.dumps(facts | {"arms": arms, "seconds": found.seconds}, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "attention", "parameters", "of layers", "MLP", "cache", "s/step"):
        table.add_column(heading, justify="left" if heading in ("", "attention") else "right")
    for arm in arms:
        table.add_row(
            arm["label"],
            arm["attention"],
            count(arm["parameters"]),
            f"{arm['difference']:+.2%}",
            str(arm["intermediate_size"]),
            str(arm["cache_elements"]),
            f"{arm['step_seconds']:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{len(plan.runs)} runs of {plan.steps:,} steps, {count(plan.tokens)} tokens each: about "
        f"{clock(found.seconds)} at the speed of this moment",
        highlight=False,
    )


def arm_facts(plan: Plan, place: int, vocab_size: int) -> dict[str, Any]:
    """Sizes of an arm; difference: of the parameters beside the embedding from the baseline's."""
    arm = plan.arms[place]
    config, base = (config_of(each.model, vocab_size) for each in (arm, plan.baseline))
    own, other = count_parameters(config), count_parameters(base)
    return {
        "name": arm.name,
        "label": arm.label,
        "attention": short_name(config.attention),
        "parameters": own.total,
        "mtp_parameters": own.mtp,
        "difference": (own.total - own.embedding) / (other.total - other.embedding) - 1,
        "intermediate_size": config.intermediate_size,
        "cache_elements": kv_cache_size(config).elements_per_token_layer,
    }
