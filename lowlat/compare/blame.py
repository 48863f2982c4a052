"""Which side makes which known mistake, out of the audits of both.

A step that both sides compute alike explains no difference. A side that does not do what its own
config says is to blame; where both do and the configs disagree, each is judged by the other's.
"""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple

from lowlat.compare.audit import AUDITED, audit
from lowlat.compare.outcome import Kind, Mistake, Outcome
from lowlat.compare.trace import Place, Trace, Window
from lowlat.config.attention import AttentionConfig, short_name
from lowlat.config.model import ModelConfig

SideName = Literal["A", "B"]
SIDES: tuple[SideName, ...] = ("A", "B")
Audits = dict[SideName, dict[Place, Outcome]]

NAMES: dict[Kind, str] = {
    "yarn_cos_sin": "YaRN scale of cos and sin",
    "yarn_softmax_scale": "YaRN scale of the softmax",
    "softmax_scale": "softmax scale",
    "rope_frequencies": "rotary frequencies",
    "rope_layout": "RoPE layout",
    "rope_missing": "missing rotation",
    "rope_order": "order of rotated channels",
    "group_mask": "group mask",
    "group_rank": "ranking of groups",
    "bias_in_weights": "bias in the weights",
    "bias_not_in_choice": "bias missing in the selection",
    "gate_precision": "gate precision",
    "gate_normalisation": "normalisation of the experts' factors",
    "gate_scaling": "routed_scaling_factor",
    "mtp_order": "MTP order",
    "mtp_hidden": "MTP hidden state",
    "mtp_zeroed": "MTP embedding of the first position",
}
"""What people call the mistakes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One known mistake of one side."""

    side: SideName
    kind: Kind
    detail: str
    judged_by: SideName
    """Whose config says what would be right."""
    places: tuple[Place, ...]
    """Where it was found, in order."""

    @property
    def name(self) -> str:
        return NAMES[self.kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the audits say about a pair of traces."""

    findings: tuple[Finding, ...]
    """By where they are found first."""
    audited: tuple[str, ...]
    """Steps that could be computed again on both sides, in words."""
    unexplained: tuple[tuple[SideName, Place], ...]
    """Steps that neither the config nor a known mistake reproduces."""


def blame(
    a: Trace, b: Trace, config_a: ModelConfig, config_b: ModelConfig, window: Window
) -> Verdict:
    """Audit both traces and say who differs from what should be."""
    own: Audits = {"A": audit(a, config_a, window), "B": audit(b, config_b, window)}
    crossed: Audits = {"A": {}, "B": {}}
    if config_a != config_b and _speak_of_the_same(config_a, config_b):
        crossed = {"A": audit(a, config_b, window), "B": audit(b, config_a, window)}
    both = sorted(own["A"].keys() & own["B"].keys(), key=lambda place: place.order)
    found: dict[_Charge, list[Place]] = {}
    for place in both:
        for charge in _charges(place, own, crossed):
            found.setdefault(charge, []).append(place)
    findings = [
        Finding(
            side=charge.side,
            kind=charge.mistake.kind,
            detail=charge.mistake.detail,
            judged_by=charge.judge,
            places=tuple(places),
        )
        for charge, places in found.items()
    ]
    strays: list[tuple[SideName, Place]] = [
        (side, place) for side in SIDES for place in both if not own[side][place].explained
    ]
    return Verdict(
        findings=tuple(findings),
        audited=tuple(dict.fromkeys(AUDITED[place.part] for place in both)),
        unexplained=tuple(strays),
    )


def _speak_of_the_same(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether one config can judge what the other's model does: the same kind of attention."""
    layers = [(a.attention_of(n), b.attention_of(n)) for n in range(a.num_hidden_layers)]
    return all(type(x) is type(y) and x.rope_dim == y.rope_dim for x, y in layers)


class _Charge(NamedTuple):
    """A side, its mistake, and the side whose config says so."""

    side: SideName
    mistake: Mistake
    judge: SideName


def _charges(place: Place, own: Audits, crossed: Audits) -> list[_Charge]:
    """Mistakes of one step that one side makes and the other does not."""
    outcomes = {side: own[side][place] for side in SIDES}
    known = {side: set(outcomes[side].mistakes) for side in SIDES}
    found = [
        _Charge(side, mistake, side)
        for side in SIDES
        for mistake in outcomes[side].mistakes
        if mistake not in known["A" if side == "B" else "B"]
    ]
    if found or not all(outcome.explained for outcome in outcomes.values()):
        return found
    judged: tuple[tuple[SideName, SideName], ...] = (("A", "B"), ("B", "A"))
    return [
        _Charge(side, mistake, judge)
        for side, judge in judged
        for mistake in crossed[side].get(place, Outcome()).mistakes
        if mistake not in known[side]
    ]


STORAGE = ("quantization", "packing", "mtp_copies")
"""Fields that say how weights are stored, not what is computed."""
LISTED = 4
"""More numbers than this are only counted."""


def disagreements(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Fields in which two configs say different things, as 'rope.mscale: 1.0 and None'."""
    return [line for line in _unequal(a, b, "") if not line.startswith(STORAGE)]


def _unequal(a: Any, b: Any, prefix: str) -> list[str]:
    found = []
    for item in fields(a):
        found += _differing(getattr(a, item.name), getattr(b, item.name), prefix + item.name)
    return found


def _differing(x: Any, y: Any, name: str) -> list[str]:
    """Two values of the field `name`; of as many layers or numbers, those that differ."""
    if x == y:
        return []
    if type(x) is type(y) and is_dataclass(x):
        return _unequal(x, y, f"{name}.")
    if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
        pairs = enumerate(zip(x, y, strict=True))
        return [line for number, pair in pairs for line in _differing(*pair, f"{name}[{number}]")]
    return [f"{name}: {_short(x)} and {_short(y)}"]


def _short(value: Any) -> str:
    """A value in a few words, those of all layers together."""
    first = value[0] if isinstance(value, tuple) and value else value
    if isinstance(first, AttentionConfig):
        return short_name(value)
    if is_dataclass(first):
        kind = type(first).__name__
        return kind if value is first else f"{kind} by layer"
    if isinstance(value, tuple) and len(value) > LISTED:
        return f"{len(value)} numbers"
    return repr(value)
