"""Diagnosis: attribute known mistakes to an implementation, from the audits of both traces.

A step that A and B compute alike is not a cause. An implementation that deviates from its own
config is the cause. If both follow their own, different configs, each is judged by the other's.
"""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from lowlat.compare.diagnosis.audit import AUDITED, audit
from lowlat.compare.diagnosis.mistakes import NAMES, Mistake, StepAudit
from lowlat.compare.trace import Place, Trace, Window
from lowlat.config.attention import AttentionConfig, short_name
from lowlat.config.model import ModelConfig

Label = Literal["A", "B"]
LABELS: tuple[Label, ...] = ("A", "B")
Audits = dict[Label, dict[Place, StepAudit]]
Attribution = tuple[Label, Mistake, Label]
"""An implementation, its mistake, and the implementation whose config judges it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A known mistake of one implementation."""

    label: Label
    kind: str
    detail: str
    judged_by: Label
    """The implementation whose config defines the correct result."""
    places: tuple[Place, ...]
    """Places of the mistake, in order of computation."""

    @property
    def name(self) -> str:
        return NAMES[self.kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """The result of both audits."""

    findings: tuple[Finding, ...]
    """Findings, in order of their first place."""
    audited: tuple[str, ...]
    """Descriptions of the steps that were recomputed in A and B."""
    unexplained: tuple[tuple[Label, Place], ...]
    """Steps that neither the config nor a known mistake reproduces."""


def diagnose(
    a: Trace, b: Trace, config_a: ModelConfig, config_b: ModelConfig, window: Window
) -> Diagnosis:
    """Audit both traces and attribute the mistakes."""
    own: Audits = {"A": audit(a, config_a, window), "B": audit(b, config_b, window)}
    crossed: Audits = {"A": {}, "B": {}}
    if config_a != config_b and _same_attention(config_a, config_b):
        crossed = {"A": audit(a, config_b, window), "B": audit(b, config_a, window)}
    both = sorted(own["A"].keys() & own["B"].keys(), key=lambda place: place.order)
    found: dict[Attribution, list[Place]] = {}
    for place in both:
        for attribution in _attributions(place, own, crossed):
            found.setdefault(attribution, []).append(place)
    findings = [
        Finding(label=label, **mistake._asdict(), judged_by=judge, places=tuple(places))
        for (label, mistake, judge), places in found.items()
    ]
    unexplained: list[tuple[Label, Place]] = [
        (label, place) for label in LABELS for place in both if not own[label][place].explained
    ]
    return Diagnosis(
        findings=tuple(findings),
        audited=tuple(dict.fromkeys(AUDITED[place.part] for place in both)),
        unexplained=tuple(unexplained),
    )


def _same_attention(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether each config can judge the other model: same kind of attention in all layers."""
    layers = [(a.attention_of(n), b.attention_of(n)) for n in range(a.num_hidden_layers)]
    return all(type(x) is type(y) and x.rope_dim == y.rope_dim for x, y in layers)


def _attributions(place: Place, own: Audits, crossed: Audits) -> list[Attribution]:
    """Mistakes in one step that only A or only B makes."""
    outcomes = {label: own[label][place] for label in LABELS}
    known = {label: set(outcomes[label].mistakes) for label in LABELS}
    found: list[Attribution] = [
        (label, mistake, label)
        for label in LABELS
        for mistake in outcomes[label].mistakes
        if mistake not in known["A" if label == "B" else "B"]
    ]
    if found or not all(outcome.explained for outcome in outcomes.values()):
        return found
    judged: tuple[tuple[Label, Label], ...] = (("A", "B"), ("B", "A"))
    return [
        (label, mistake, judge)
        for label, judge in judged
        for mistake in crossed[label].get(place, StepAudit()).mistakes
        if mistake not in known[label]
    ]


STORAGE = ("quantization", "packing", "mtp_copies")
"""Fields about the storage of weights, not about the computation."""
LISTED = 4
"""Longer tuples of numbers are described by their length."""


def config_differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Fields in which two configs differ, such as 'rope.mscale: 1.0 and None'."""
    return [line for line in _unequal(a, b, "") if not line.startswith(STORAGE)]


def _unequal(a: Any, b: Any, prefix: str) -> list[str]:
    found = []
    for item in fields(a):
        found += _differing(getattr(a, item.name), getattr(b, item.name), prefix + item.name)
    return found


def _differing(x: Any, y: Any, name: str) -> list[str]:
    """Two values of the field `name`; of tuples of equal length, the elements that differ."""
    if x == y:
        return []
    if type(x) is type(y) and is_dataclass(x):
        return _unequal(x, y, f"{name}.")
    if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
        pairs = enumerate(zip(x, y, strict=True))
        return [line for number, pair in pairs for line in _differing(*pair, f"{name}[{number}]")]
    return [f"{name}: {_short(x)} and {_short(y)}"]


def _short(value: Any) -> str:
    """A short description of a value; values of all layers in one."""
    first = value[0] if isinstance(value, tuple) and value else value
    if isinstance(first, AttentionConfig):
        return short_name(value)
    if is_dataclass(first):
        kind = type(first).__name__
        return kind if value is first else f"{kind} by layer"
    if isinstance(value, tuple) and len(value) > LISTED:
        return f"{len(value)} numbers"
    return repr(value)
