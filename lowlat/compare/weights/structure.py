"""Explain a weight by a reordering of its own rows: RoPE rows, heads, parts, transposed slices."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowlat.compare.weights.finding import Explanation, listed, moved
from lowlat.compare.weights.layout import HeadLayout, Part

PROBED = 16
"""Columns on which a reordering of rows is tried before all are."""
MOST_HEADS = 256
"""Wrong numbers of heads that are tried."""
GROUP = 4
"""Fewest values whose common scale means anything."""
BLOCK = 128
"""Rows and columns of a block of DeepSeek-V3's fp8 weights."""


@dataclass(kw_only=True, slots=True)
class Structure:
    """What explains the heads of a weight."""

    explanations: list[Explanation] = field(default_factory=list)
    unexplained: str = ""
    """Heads and parts that nothing explains: 'the k rows of head 2'; empty if there are none."""


def relative(x: Tensor, y: Tensor) -> float:
    """Norm of x - y over that of y; infinite if it is not a number."""
    size = float(y.norm())
    found = float((x - y).norm()) / size if size else math.inf if float(x.norm()) else 0.0
    return math.inf if math.isnan(found) else found


def explain_vector(a: Tensor, b: Tensor, unit: str) -> list[Explanation]:
    """Entries of a vector in another order."""
    order_a, order_b = a.argsort(stable=True), b.argsort(stable=True)
    if not torch.equal(a[order_a], b[order_b]):
        return []
    sources = torch.empty_like(order_a)
    sources[order_b] = order_a
    other = (a != b).nonzero()[:, 0].tolist()
    moves = {to: int(sources[to]) for to in other}
    kind = "experts" if unit == "expert" else "channels"
    return [Explanation(kind, text) for text in moved(moves, unit)]


def is_transposed(a: Tensor, b: Tensor, limit: float) -> bool:
    """Whether b has the values of a by columns instead of rows."""
    return relative(a.T.reshape(a.shape), b) <= limit


def explain_scales(a: Tensor, b: Tensor, limit: float) -> list[Explanation]:
    """A matrix that is scaled by row, column or block."""
    groups = {
        "row": (1, a.shape[1]),
        "column": (a.shape[0], 1),
        f"block of {BLOCK}": (BLOCK, BLOCK),
    }
    for name, size in groups.items():
        if math.prod(size) >= GROUP and relative(_scaled(a, b, size), b) <= limit:
            hint = ", as if fp8 scales were left out" if name.startswith("block") else ""
            return [Explanation("scale", f"scales every {name} by its own factor{hint}")]
    return []


def _scaled(a: Tensor, b: Tensor, size: tuple[int, int]) -> Tensor:
    """a with every group of `size` scaled to be closest to b."""
    counts = [-(-length // step) for length, step in zip(a.shape, size, strict=True)]
    index = [torch.arange(length) // step for length, step in zip(a.shape, size, strict=True)]

    def by_group(values: Tensor) -> Tensor:
        rows = values.new_zeros(counts[0], a.shape[1]).index_add_(0, index[0], values)
        return rows.new_zeros(*counts).index_add_(1, index[1], rows)

    factors = by_group(a * b) / by_group(a * a).clamp_min(1e-30)
    return a * factors[index[0]][:, index[1]]


def explain_heads(
    a: Tensor, b: Tensor, layout: HeadLayout, limit: float, *, interleave: bool
) -> Structure:
    """Explain b by a whose heads, parts of heads and RoPE rows are reordered.

    interleave: whether RoPE pairs of `a` are neighbouring rows. limit: largest relative difference
    of an explained part.
    """
    if layout.axis:
        a, b = a.transpose(0, 1), b.transpose(0, 1)
    a, b = (each.reshape(layout.heads * layout.size, -1) for each in (a, b))
    for kind, detail, index in _orders(layout, interleave):
        if (
            relative(a[index][:, :PROBED], b[:, :PROBED]) <= limit
            and relative(a[index], b) <= limit
        ):
            return Structure(explanations=[Explanation(kind, detail)])
    return _Heads(a, b, layout, limit, interleave).explain()


def _orders(layout: HeadLayout, interleave: bool) -> Iterator[tuple[str, str, Tensor]]:
    """Orders of all rows: kind, detail, and the rows of A in B's order."""
    index = torch.arange(layout.heads * layout.size).view(layout.heads, layout.size)
    rows, parts = layout.rows, layout.parts
    if len(parts) == 2:
        first, second = (part.name for part in parts)
        halves = index[:, : parts[0].size], index[:, parts[0].size :]
        swapped = torch.cat([halves[1], halves[0]], dim=1)
        where = f" in {listed(range(layout.heads), layout.heads, layout.unit)}" * bool(layout.unit)
        yield "parts", f"has {second} {rows} before {first} {rows}{where}", swapped.flatten()
        if layout.heads > 1:
            apart = torch.cat([half.flatten() for half in halves])
            yield "parts", f"has the {first} {rows} of all heads before the {second} {rows}", apart
    if layout.heads > 1 and layout.size > 1:
        detail = f"has {rows} in the order (channel, {layout.unit})"
        yield "heads", f"{detail}, not ({layout.unit}, channel)", index.T.flatten()
    if len(parts) > 1 and any(part.rotates for part in parts) and layout.heads > 1:
        for detail, order in rope_orders(layout.size, interleave):
            yield (
                "rope_rows",
                f"{detail}, taking whole heads for RoPE {rows}",
                index[:, order].flatten(),
            )
    if all(part.rotates for part in parts) and layout.unit:
        for count in range(1, MOST_HEADS + 1):
            if count == layout.heads or index.numel() % (2 * count):
                continue
            wrong, heads = index.view(count, -1), f"{count} head{'s' * (count > 1)}"
            for detail, order in rope_orders(wrong.shape[1], interleave):
                found = wrong[:, order].flatten()
                yield (
                    "rope_rows",
                    f"{detail}, as for {heads} instead of {layout.heads}",
                    found,
                )


def rope_orders(width: int, interleave: bool) -> list[tuple[str, Tensor]]:
    """Wrong orders of `width` RoPE rows: detail, and the rows of A in B's order."""
    if width % 2:
        return []
    pairs = torch.arange(width)
    to_halves = torch.cat([pairs[0::2], pairs[1::2]])
    to_pairs = to_halves.argsort()
    names = "(2i, 2i+1)", "(i, i + d/2)"
    halves = f"has RoPE rows in pairs {names[1]} where A has {names[0]}", to_halves
    neighbours = f"has RoPE rows in pairs {names[0]} where A has {names[1]}", to_pairs
    found = [halves, neighbours] if interleave else [neighbours, halves]
    for _, order in (found[0], found[1]):
        if not torch.equal(order[order], pairs):
            found.append(("has RoPE rows reordered twice", order[order]))
    return [each for each in found if not torch.equal(each[1], pairs)]


@dataclass(slots=True)
class _Heads:
    """Explains head by head, and part by part."""

    a: Tensor
    b: Tensor
    layout: HeadLayout
    limit: float
    interleave: bool
    details: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """Heads by kind and sentence, in which {of} and {at} stand for the heads."""
    moves: dict[str, dict[int, int]] = field(default_factory=dict)
    """A's head by B's head, by part."""
    swaps: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """Heads by a part of B, and the part of A that it holds."""
    unexplained: dict[str, list[int]] = field(default_factory=dict)
    """Heads by part."""

    def explain(self) -> Structure:
        heads = self._transposed_heads()
        start = 0
        for part in self.layout.parts:
            for head in heads:
                self._explain_part(part, start, head)
            start += part.size
        explanations = [
            Explanation(
                kind, detail.format(of=self._heads(" of ", own), at=self._heads(", in ", own))
            )
            for (kind, detail), own in self.details.items()
        ]
        explanations += [*self._swapped(), *self._moved()]
        return Structure(explanations=explanations, unexplained=self._places())

    def _transposed_heads(self) -> list[int]:
        """Heads that are not transposed as a whole; a sentence names the others."""
        whole = Part("", self.layout.size)
        rest = []
        for head in range(self.layout.heads):
            x, y = (self._rows(each, head, 0, whole) for each in (self.a, self.b))
            if min(x.shape) > 1 and relative(x.T.reshape(x.shape), y) <= self.limit < relative(
                x, y
            ):
                self._add("transposed", f"has the {self.layout.rows}{{of}} transposed", head)
            else:
                rest.append(head)
        return rest

    def _explain_part(self, part: Part, start: int, head: int) -> None:
        x, y = (self._rows(each, head, start, part) for each in (self.a, self.b))
        if relative(x, y) <= self.limit:
            return
        name = f"{part.name} {self.layout.rows}".strip()
        found = self._reordered(part, x, y) or self._scaled(name, x, y)
        if found is not None:
            self._add(*found, head)
        elif (other := self._swapped_part(part, y, head)) is not None:
            self.swaps.setdefault((part.name, other), []).append(head)
        elif (source := self._source(part, start, y)) is not None:
            self.moves.setdefault(part.name, {})[head] = source
        else:
            self.unexplained.setdefault(part.name, []).append(head)

    def _rows(self, values: Tensor, head: int, start: int, part: Part) -> Tensor:
        first = head * self.layout.size + start
        return values[first : first + part.size]

    def _add(self, kind: str, detail: str, head: int) -> None:
        self.details.setdefault((kind, detail), []).append(head)

    def _reordered(self, part: Part, x: Tensor, y: Tensor) -> tuple[str, str] | None:
        for detail, order in rope_orders(part.size, self.interleave) if part.rotates else ():
            if relative(x[order], y) <= self.limit:
                return "rope_rows", f"{detail}{{at}}"
        if min(x.shape) > 1 and relative(x.T.reshape(x.shape), y) <= self.limit:
            name = f"{part.name} {self.layout.rows}".strip()
            return "transposed", f"has the {name}{{of}} transposed"
        return None

    def _scaled(self, name: str, x: Tensor, y: Tensor) -> tuple[str, str] | None:
        """`name`: of the rows."""
        if not bool(y.any()):
            return "constant", f"has zeros in the {name}{{of}}"
        size = float((x * x).sum())
        factor = float((x * y).sum()) / size if size and x.numel() >= GROUP else math.nan
        if math.isnan(factor) or relative(factor * x, y) > self.limit:
            return None
        return "scale", f"scales the {name}{{of}} by {factor:.4g}"

    def _swapped_part(self, part: Part, y: Tensor, head: int) -> str | None:
        """The other part of A's head that a part of B's holds."""
        start = 0
        for other in self.layout.parts:
            own = self._rows(self.a, head, start, other)
            if other is not part and own.shape == y.shape and relative(own, y) <= self.limit:
                return other.name
            start += other.size
        return None

    def _source(self, part: Part, start: int, y: Tensor) -> int | None:
        """The head of A whose part a head of B holds."""
        heads = self.a.view(self.layout.heads, self.layout.size, -1)[:, start : start + part.size]
        flat = heads.flatten(1)
        likeness = flat @ y.flatten() / flat.norm(dim=1).clamp_min(1e-30)
        nearest = int(likeness.argmax())
        return nearest if relative(heads[nearest], y) <= self.limit else None

    def _swapped(self) -> Iterator[Explanation]:
        rows = self.layout.rows
        for (part, other), heads in self.swaps.items():
            if self.swaps.get((other, part)) != heads:
                detail = f"has the {other} {rows} as {part} {rows}{self._heads(' of ', heads)}"
                yield Explanation("parts", detail)
            elif part < other:
                detail = f"exchanges {part} and {other} {rows}{self._heads(' of ', heads)}"
                yield Explanation("parts", detail)

    def _moved(self) -> Iterator[Explanation]:
        layout, moves = self.layout, self.moves
        alike = list(moves.values())
        if len(alike) == len(layout.parts) > 1 and all(each == alike[0] for each in alike):
            moves = {"": alike[0]}
        is_router = layout.unit == "expert"
        for name, sources in moves.items():
            what = f"the {name} {layout.rows} of " if name else "the router rows of " * is_router
            for text in moved(sources, layout.unit, what):
                yield Explanation("experts" if is_router else "heads", text)

    def _places(self) -> str:
        if self._is_all_unexplained():
            return ""
        places = []
        for name, heads in self.unexplained.items():
            rows = f"{name} {self.layout.rows}".strip()
            places.append(f"the {rows}{self._heads(' of ', heads)}")
        return " and ".join(places)

    def _is_all_unexplained(self) -> bool:
        """Whether heads do not say where the difference is."""
        sizes = [len(heads) for heads in self.unexplained.values()]
        return sizes == [self.layout.heads] * len(self.layout.parts)

    def _heads(self, before: str, heads: list[int]) -> str:
        named = listed(heads, self.layout.heads, self.layout.unit)
        return f"{before}{named}" if named else ""
