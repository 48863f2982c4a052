"""`lowlat-lab study attention`: attention variants at equal parameters.

Heads and head width are equal; an MLP width per variant equalises the parameters.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowlat.config.attention import short_name
from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.parameter_count import count_parameters
from lowlat.data.dataset import TokenizedDataset
from lowlat.train.recipe.schema import Recipe
from lowlat.utils.atomic_files import replace_file
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress
from lowlat.utils.strict_json import parse_object
from lowlat_lab.study.decode import as_json, decode_times
from lowlat_lab.study.plan import StudyPlan, Variant, config_of, model_table
from lowlat_lab.study.report import Report, make_report
from lowlat_lab.study.resumable import RunResult
from lowlat_lab.study.run import model_folder, run_all
from lowlat_lab.study.sizes import StudySize
from lowlat_lab.study.statistics import interval
from lowlat_lab.study.tasks import accuracies, has_tasks

TOLERANCE = 0.01
"""Largest difference of non-embedding parameters from the baseline's."""

AFTER_MLA = ("mlra-4", "mla-gated", "dsa", "mla-nope", "gla-2", "gta-4", "tpa")
"""Variants published after MLA."""
NOT_BY_DEFAULT = ("gqa-4", "mqa", "gla-2", "gta-4", "tpa")
"""Variants that run only if --variants names them."""
DECODE_FILE = "decode.json"
SPARSITY = 4
"""Tokens of a sequence over those that a query of DSA attends to (index_topk)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """A variant's parameters compared with the baseline's."""

    parameters: int
    """Total; the tied embedding counts once."""
    without_embedding: int
    """Of the layers."""
    difference: float
    """without_embedding over the baseline's, minus 1."""
    intermediate_size: int
    """MLP width."""
    cache_elements: int | float
    """Elements per token and layer."""
    groups_equivalent: float
    """Groups of a GQA with the same cache."""


def attention_variants(size: StudySize, vocab_size: int) -> tuple[Variant, ...]:
    """All variants, MHA first. Raises UserError if no MLP width brings one within TOLERANCE."""
    forms = _forms(size)
    target = _layers(size, forms["mha"][1], size.intermediate_size, vocab_size)
    variants = []
    for name, (label, form) in forms.items():
        width = _width(size, form, vocab_size, target)
        variants.append(Variant(name=name, label=label, model=model_table(size, form, width)))
        difference = _layers(size, form, width, vocab_size) / target - 1
        if abs(difference) > TOLERANCE:
            raise UserError(
                f"--size {size.name}: no MLP width brings {label} within {TOLERANCE:.0%} of MHA's "
                f"parameters ({difference:+.1%}); choose a larger size"
            )
    return tuple(variants)


def usual(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """The variants that run by default."""
    return tuple(variant for variant in variants if variant.name not in NOT_BY_DEFAULT)


def matched(variant: Variant, baseline: Variant, vocab_size: int) -> Matched:
    """Parameters of `variant`, compared with those of `baseline`."""
    config, other = config_of(variant.model, vocab_size), config_of(baseline.model, vocab_size)
    count, base = count_parameters(config), count_parameters(other)
    cost = kv_cache_size(config)
    return Matched(
        parameters=count.total,
        without_embedding=count.total - count.embedding,
        difference=(count.total - count.embedding) / (base.total - base.embedding) - 1,
        intermediate_size=config.intermediate_size,
        cache_elements=cost.elements_per_token_layer,
        groups_equivalent=cost.gqa_groups_equivalent,
    )


def _forms(size: StudySize) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label and [model.attention] table of every variant.

    GQA-2 has a quarter of MHA's cache. MLA's latent and key are the paper's 4 d_h and d_h / 2: the
    cache of GQA with 2.25 groups. MLRA-4 has the same in four branches (arXiv 2603.02188), GLA-2 in
    two latents, GTA-4 in four tied states (arXiv 2505.21487); DSA also has an index key (arXiv
    2512.02556). TPA has the ranks 6, 2, 2 of arXiv 2501.06425. Queries are not compressed, as in
    DeepSeek-V2-Lite.
    """
    heads, width = size.num_attention_heads, size.head_dim

    def gqa(groups: int) -> dict[str, Any]:
        form = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": width}
        return {"form": "gqa"} | form

    latent = {
        "num_attention_heads": heads,
        "kv_lora_rank": 4 * width,
        "qk_nope_head_dim": width,
        "qk_rope_head_dim": width // 2,
        "v_head_dim": width,
    }
    tied = {
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": width,
        "qk_rope_head_dim": width // 2,
    }
    # every second layer without RoPE; its heads keep their width
    layers = range(size.num_hidden_layers)
    alternating = latent | {
        "qk_nope_head_dim": [width + place % 2 * (width // 2) for place in layers],
        "qk_rope_head_dim": [(1 - place % 2) * (width // 2) for place in layers],
    }
    indexer = {
        "index_n_heads": heads // 2,
        "index_head_dim": width,
        "index_topk": size.sequence_length // SPARSITY,
    }
    factors = {"num_attention_heads": heads, "head_dim": width}
    return {
        "mha": ("MHA", gqa(heads)),
        "gqa-4": ("GQA-4", gqa(4)),
        "gqa-2": ("GQA-2", gqa(2)),
        "mqa": ("MQA", gqa(1)),
        "mla": ("MLA", {"form": "mla"} | latent),
        "mlra-4": ("MLRA-4", {"form": "gla", "num_latent_groups": 4, "sum_groups": True} | latent),
        "mla-gated": ("gated MLA", {"form": "mla", "attn_output_gate": True} | latent),
        "dsa": ("DSA", {"form": "mla", "indexer": indexer} | latent),
        "mla-nope": ("MLA, RoPE in every 2nd layer", {"form": "mla"} | alternating),
        "gla-2": ("GLA-2", {"form": "gla", "num_latent_groups": 2} | latent),
        "gta-4": ("GTA-4", {"form": "gta"} | tied),
        "tpa": ("TPA", {"form": "tpa", "q_rank": 6, "k_rank": 2, "v_rank": 2} | factors),
    }


def _layers(size: StudySize, form: dict[str, Any], width: int, vocab_size: int) -> int:
    """Non-embedding parameters with an MLP of `width`."""
    count = count_parameters(config_of(model_table(size, form, width), vocab_size))
    return count.total - count.embedding


def _width(size: StudySize, form: dict[str, Any], vocab_size: int, target: int) -> int:
    """The MLP width, a multiple of width_step, with the parameters nearest to `target`."""
    step = size.width_step
    first, second = (_layers(size, form, width, vocab_size) for width in (step, 2 * step))
    return max(1, 1 + round((target - first) / (second - first))) * step


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs to compare: those of DeepSeek-V2's claim MLA >= MHA > GQA > MQA, every other variant
    with MHA, and those published after MLA with MLA.
    """
    gqa = grouped(names)
    wanted = [("mla", "mha"), ("mha", gqa), (gqa, "mqa"), ("mla", gqa)]
    wanted += [(name, "mha") for name in names if name not in ("mha", "mla")]
    wanted += [(name, "mla") for name in AFTER_MLA]
    there = [pair for pair in wanted if set(pair) <= set(names)]
    return list({frozenset(pair): pair for pair in reversed(there)}.values())[::-1]


def grouped(names: Sequence[str]) -> str:
    """The GQA of the claim: preferably the one whose cache size is MLA's."""
    return next((name for name in ("gqa-2", "gqa-4") if name in names), "")


def study(
    plan: StudyPlan, data: TokenizedDataset, out: Path, progress: Progress, command: str
) -> Report:
    """Run or resume the study, and report."""

    def measure_tasks(folder: Path, _recipe: Recipe, progress: Progress) -> dict[str, Any]:
        with progress.task("tasks"):
            return {"tasks": accuracies(folder, data)}

    also = measure_tasks if has_tasks(data) else None
    ran = run_all(plan, data, out, progress, also=also)
    names = [variant.name for variant in plan.variants]
    report = make_report(plan, data, ran, command=command, pairs=pairs_of(names))
    times, reason = _decode_times(plan, data, out, ran, progress)
    if reason is not None:
        report["failures"].append({"variant": "all", "seed": None, "reason": f"decoding: {reason}"})
    for variant, entry in zip(plan.variants, report["variants"], strict=True):
        config = config_of(variant.model, data.vocab_size)
        entry |= asdict(matched(variant, plan.baseline, data.vocab_size))
        entry["form"] = short_name(config.attention)
        entry["cache_bytes_per_token"] = kv_cache_size(config).own_bytes_per_token("bf16")
        entry["decode"] = times.get(variant.name, [])
        entry |= _task_figures([run["tasks"] for run in entry["runs"] if "tasks" in run])
    return report


def _task_figures(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Accuracy of each task over seeds: mean over lengths, and by length."""
    if not runs:
        return {}
    return {
        name: asdict(interval([statistics.fmean(run[name].values()) for run in runs]))
        | {
            "by_length": {
                length: asdict(interval([run[name][length] for run in runs]))
                for length in runs[0][name]
            }
        }
        for name in runs[0]
    }


def _decode_times(
    plan: StudyPlan, data: TokenizedDataset, out: Path, ran: Sequence[RunResult], progress: Progress
) -> tuple[dict[str, list[dict[str, Any]]], str | None]:
    """Decode times by variant, of each variant's first finished model, or the reason of a failure.
    They are stored in OUT/decode.json, which a plan without measurement reads.
    """
    stored = out / DECODE_FILE
    if not plan.measures_speed:
        return (parse_object(stored.read_bytes(), str(stored)) if stored.exists() else {}), None
    models: dict[str, Path] = {}
    for run in sorted(ran, key=lambda run: run.seed):
        if run.result is not None:
            models.setdefault(run.variant, model_folder(out, run.variant, run.seed))
    order = {
        variant.name: models[variant.name] for variant in plan.variants if variant.name in models
    }
    contexts = plan.size.decode_contexts
    try:
        times = decode_times(order, data, contexts=contexts, reference="mla", progress=progress)
    except UserError as error:
        return {}, str(error)
    found = as_json(times)
    replace_file(stored, json.dumps(found).encode() + b"\n")
    return found, None
