"""Explanations of weights that differ, and their sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Label = Literal["A", "B"]

WEIGHT_NAMES = {
    "rounding": "rounded weights",
    "scale": "scaled weights",
    "offset": "shifted weights",
    "experts": "order of experts",
    "gate_up": "gate and up exchanged",
    "rope_rows": "order of RoPE rows",
    "heads": "order of heads",
    "parts": "order of rows in a head",
    "channels": "order of channels",
    "transposed": "transposed weights",
    "other_layer": "weights of another layer",
    "other_tensor": "weights of another tensor",
    "constant": "constant weights",
    "unexplained": "unexplained weights",
}
"""Descriptions of the explanations, by kind."""
LISTED = 4
"""More heads or experts than this are counted, not listed."""


class Explanation(NamedTuple):
    """What one implementation does to a weight, or to some of them."""

    kind: str
    """A key of WEIGHT_NAMES."""
    detail: str
    """Without a subject: 'exchanges experts 3 and 4'."""
    label: Label = "B"
    """The checkpoint it describes."""


class Place(NamedTuple):
    """Where an explanation holds: a tensor, or a module with several."""

    name: str
    relative: float
    """Root mean square of the difference over that of A's values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFinding:
    """An explanation and all its places."""

    explanation: Explanation
    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        return WEIGHT_NAMES[self.explanation.kind]

    @property
    def relative(self) -> float:
        return max(place.relative for place in self.places)


def listed(numbers: Sequence[int], total: int, unit: str) -> str:
    """'head 2', 'heads 1 and 3', 'heads 0, 1, 2, 3 and 5 more', 'all heads'; '' without a unit."""
    if not unit:
        return ""
    if len(numbers) == 1:
        return f"{unit} {numbers[0]}"
    if len(numbers) == total:
        return f"all {unit}s"
    return f"{unit}s {enumerated(numbers)}"


def enumerated(numbers: Sequence[int]) -> str:
    """'1 and 3', '0, 1, 2, 3 and 5 more'."""
    shown = [str(number) for number in numbers]
    if len(shown) > LISTED:
        return f"{', '.join(shown[:LISTED])} and {len(shown) - LISTED} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def moved(sources: Mapping[int, int], unit: str, what: str = "") -> list[str]:
    """Sentences for units of B that hold other units of A; `sources`: A's number by B's.

    Pairs that hold each other are exchanged; others are listed. what: the part that moved, such as
    'the k rows of '.
    """
    pairs = [(to, of) for to, of in sources.items() if to < of and sources.get(of) == to]
    sentences = [f"exchanges {what}{unit}s {to} and {of}" for to, of in pairs[:LISTED]]
    if len(pairs) > LISTED:
        sentences.append(f"exchanges {what}{len(pairs) - LISTED} more pairs of {unit}s")
    exchanged = {number for pair in pairs for number in pair}
    rest = {to: of for to, of in sorted(sources.items()) if to not in exchanged}
    if rest:
        own, others = enumerated([*rest]), enumerated([*rest.values()])
        units = f"{unit}s" if len(rest) > 1 else unit
        sentences.append(f"has {what}A's {units} {others} in {units} {own}")
    return sentences
