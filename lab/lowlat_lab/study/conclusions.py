"""What a report says about its question, in sentences that claim no more than its intervals.

Owns these sentences alone.
"""

from typing import Any

from lowlat.train.metrics.formatting import count
from lowlat_lab.study.attention import LATER, grouped
from lowlat_lab.study.figures import percent, with_half
from lowlat_lab.study.findings import confidence, sentence
from lowlat_lab.study.precision import BOUND
from lowlat_lab.study.report import Report, find_comparison, labels_of

Item = dict[str, Any]


def conclusions(report: Report) -> list[str]:
    """Paragraphs of the page below its picture."""
    match report["study"]:
        case "attention":
            return _attention(report)
        case "balance":
            return _balance(report)
        case "precision":
            return _precision(report)
        case _:
            return _mtp(report)


def _attention(report: Report) -> list[str]:
    return [
        "## The claim",
        *_claim(report),
        "## Is anything better than MLA?",
        *_later(report),
        "## Limits",
        _limits(report),
    ]


def claim_steps(report: Report) -> list[tuple[str, str, str]]:
    """(left, sign, right) of 'MLA >= MHA > GQA > MQA' among the arms of a report."""
    gqa = grouped([arm["name"] for arm in report["arms"]])
    return [("mla", ">=", "mha"), ("mha", ">", gqa), (gqa, ">", "mqa")]


def step_outcome(item: Item, sign: str) -> str:
    """'shown', 'contradicted' or 'undecided', for left `sign` right in quality (a lower loss)."""
    match item["verdict"]:
        case "lower":
            return "shown"
        case "higher":
            return "contradicted"
        case _:
            return "not contradicted" if sign == ">=" else "undecided"


def _claim(report: Report) -> list[str]:
    labels = labels_of(report)
    lines, outcomes = [], []
    for left, sign, right in claim_steps(report):
        item = find_comparison(report, left, right)
        if item is not None:
            outcome = step_outcome(item, sign)
            outcomes.append(outcome)
            lines.append(
                f"- {labels[left]} {sign} {labels[right]}: **{outcome}**. {sentence(item, labels)}."
            )
    same_cache = find_comparison(report, "mla", "gqa-2")
    parts = [
        "*MLA >= MHA > GQA > MQA in quality, at the cache of GQA with 2.25 groups* "
        "(DeepSeek-V2, section 2.1 and appendix D), step by step (loss of the left minus loss of "
        "the right; a lower loss is better):",
        "\n".join(lines),
    ]
    if same_cache is not None:
        parts.append(f"At about the same cache: {sentence(same_cache, labels)}.")
    found = ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes))
    return [*parts, f"Of {len(outcomes)} steps: {found}."] if outcomes else []


def _later(report: Report) -> list[str]:
    labels = labels_of(report)
    items = [item for name in LATER if (item := find_comparison(report, name, "mla")) is not None]
    if not items:
        return ["Nothing published later was run."]
    better = [labels[item["left"]] for item in items if item["verdict"] == "lower"]
    likely = [
        labels[item["left"]]
        for item in items
        if item["verdict"] == "undecided" and item["pooled_verdict"] == "lower"
    ]
    if better:
        answer = f"By held-out loss at this scale, yes: {_joined(better)}."
    elif likely:
        answer = (
            f"Not by the seeds of each pair; with the spread of all arms {_joined(likely)} "
            f"{'is' if len(likely) == 1 else 'are'} ahead."
        )
    else:
        answer = "At this scale none of these has a lower loss beyond the noise."
    entries = {arm["name"]: arm for arm in report["arms"]}
    own = entries["mla"]["cache_bytes_per_token"]
    lines = [
        f"- {sentence(item, labels)}; cache "
        f"{entries[item['left']]['cache_bytes_per_token'] / own:.2f} times MLA's."
        for item in items
    ]
    return [answer, "\n".join(lines)]


def _limits(report: Report) -> str:
    size = report["size"]
    made = len(report["comparisons"])
    return (
        f"Models of {count(report['arms'][0]['parameters'])} parameters, "
        f"{count(report['tokens'])} tokens, "
        f"{len(report['seeds'])} seeds, sequences of {size['sequence_length']}, dense MLPs, one "
        "learning rate for all arms, not tuned for any. Published comparisons are of models "
        "of billions of parameters and of hundreds of billions of tokens; neither an order found "
        "here nor one missing here carries over to them. Within noise means that the "
        "difference is smaller than these seeds can show, not that there is none. "
        f"{made} comparisons at {confidence()} each: about one in twenty would look real by chance "
        "alone. Confidence is over seeds; the held-out text is one sample of its kind."
    )


def _balance(report: Report) -> list[str]:
    labels = {name: _quoted(label) for name, label in labels_of(report).items()}
    lines = [f"- {sentence(item, labels)}." for item in report["comparisons"]]
    loads = [
        f"- {_quoted(arm['label'])}: {with_half(arm['train_max_violations_mean'], 2)} in the last "
        f"steps, {with_half(arm['max_violations_mean'], 2)} on held-out text."
        for arm in report["arms"]
        if "loss" in arm
    ]
    return [
        "## Loss",
        "\n".join(lines),
        "## Balance",
        "MaxVio, the largest load of an expert over the mean load, minus 1, averaged over layers: "
        "of single training batches at the end, and of all held-out windows together.",
        "\n".join(loads),
        "## Limits",
        "*Loss* and a number: balanced by the auxiliary loss of that weight alone; *bias*: by "
        "DeepSeek-V3's bias with a loss of 0.0001 beside it. "
        "The auxiliary loss is the sequence-wise one of DeepSeek-V3 (equations 17 to 20) with a "
        "larger weight; a loss over whole batches would bind less. The bias moves by 0.001 a step, "
        f"so {report['steps']:,} steps let it travel {report['steps'] / 1000:.2f} at most. "
        + _SCALE.format(seeds=len(report["seeds"])),
    ]


def _mtp(report: Report) -> list[str]:
    labels = labels_of(report)
    lines = [f"- {sentence(item, labels)}." for item in report["comparisons"]]
    on = report["arms"][-1]
    parts = ["## Main loss", "\n".join(lines)]
    if "acceptance_mean" in on:
        parts += [
            "## Drafts",
            f"On held-out text the module's draft is the token that the main model itself would "
            f"take in {with_half(on['acceptance_mean'], 3)} of the positions. Both are the text's "
            f"own token less often, {with_half(on['draft_hits_mean'], 3)} and "
            f"{with_half(on['main_hits_mean'], 3)}: models trained for a short time agree on what "
            "is common. DeepSeek-V3 reports 0.85 to 0.90, over text that it generates.",
        ]
    return [*parts, "## Limits", _SCALE.format(seeds=len(report["seeds"]))]


def _precision(report: Report) -> list[str]:
    labels = labels_of(report)
    lines = [f"- {sentence(item, labels)}." for item in report["comparisons"]]
    shares = [
        f"- {arm['label']}: {percent(arm['loss_relative'])} on held-out text, "
        f"{percent(arm['train_loss_relative'])} in the last steps; "
        f"{_within(arm['train_loss_relative'])} {100 * BOUND:.2f} % of bf16's training loss."
        for arm in report["arms"]
        if "loss_relative" in arm
    ]
    return [
        "## Loss",
        "\n".join(lines),
        "## Beside bf16",
        "\n".join(shares),
        "## Limits",
        "FP8 is the recipe of DeepSeek-V3 (section 3.3): products of e4m3 numbers in blocks of "
        "1x128 and 128x128 that share a scale, computed exactly on this machine, which has no such "
        "products and only loses time by them. Its model is saved as FP8 and read so on held-out "
        "text; bf16's and fp32's are saved in fp32. " + _SCALE.format(seeds=len(report["seeds"])),
    ]


def _within(share: dict[str, Any]) -> str:
    """By the far end of the interval, and by the mean where that leaves it open."""
    mean, half = abs(share["mean"]), share["half"]
    if half is not None and mean + half <= BOUND:
        return "within"
    return "in the mean within" if mean <= BOUND else "not within"


_SCALE = (
    "Small models, few tokens, {seeds} seeds, one learning rate for all arms: an order found here "
    "need not hold at scale, and a difference within noise is one that these seeds cannot show."
)


def _quoted(label: str) -> str:
    return f"*{label}*"


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
