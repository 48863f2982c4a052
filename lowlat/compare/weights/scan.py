"""Streamed comparison of two weights: equal, rounded, scaled or shifted; and how much differs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowlat.compare.weights.checkpoint import CheckpointWeights, wide

CHUNK_ELEMENTS = 2**18
"""Elements compared at a time: temporaries stay in the processor's cache."""
SMALL_ROW = 0.1
"""Rows of a smaller norm, as a share of the mean, count as this large."""
SUMMED_CHUNKS = 4
"""Chunks after which a rounding that fits so far is tried on all."""
PROBED_ROWS = 8
"""Rows on which a rounding is tried before all are."""


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda values: values.to(dtype).to(values.dtype)


def _truncated(values: Tensor) -> Tensor:
    """fp32 without the low half of its bits."""
    return (values.float().view(torch.int32) & -65536).view(torch.float32).to(values.dtype)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "rounded to fp32": _cast(torch.float32),
    "rounded to bf16": _cast(torch.bfloat16),
    "truncated to bf16": _truncated,
    "rounded to fp16": _cast(torch.float16),
    "rounded to fp8 (e4m3)": _cast(torch.float8_e4m3fn),
    "rounded to fp8 (e5m2)": _cast(torch.float8_e5m2),
}
"""Roundings of single numbers, which are recognised exactly."""


@dataclass(slots=True)
class WeightScan:
    """Sums over the rows of two weights a and b."""

    equal: bool = True
    """Whether all values are equal."""
    error: float = 0.0
    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    count: int = 0
    sum_a: float = 0.0
    sum_b: float = 0.0
    rows: int = 0
    changed_rows: int = 0
    first_changed: int | None = None
    worst_row: float = 0.0
    """Largest relative difference of a row."""
    b_rounds: set[str] = field(default_factory=lambda: set(ROUNDINGS))
    """Keys of ROUNDINGS that turn a into b."""
    a_rounds: set[str] = field(default_factory=lambda: set(ROUNDINGS))
    """Keys of ROUNDINGS that turn b into a."""

    @property
    def relative(self) -> float:
        """Root mean square of the difference over that of a."""
        return _ratio(self.error, self.a)

    @property
    def scale(self) -> float:
        """The c for which c a is closest to b."""
        return self.product / self.a if 0 < self.a < math.inf else math.nan

    @property
    def scale_residual(self) -> float:
        """Relative difference of b and c a."""
        return _ratio(max(self.b - self.scale * self.product, 0.0), self.b)

    @property
    def offset(self) -> float:
        """The c for which a + c is closest to b."""
        return (self.sum_b - self.sum_a) / max(self.count, 1)

    @property
    def offset_residual(self) -> float:
        """Relative difference of b and a + c."""
        rest = self.error - self.count * self.offset**2
        return _ratio(max(rest, 0.0), self.b)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add equally many rows of a and b, in fp32 or fp64."""
        delta = y - x
        squares, b, product, error, sum_a, sum_b = (
            _by_row(values).sum(dim=1).double()
            for values in (x.square(), y.square(), x * y, delta.square(), x, y)
        )
        self.a += float(squares.sum())
        self.b += float(b.sum())
        self.product += float(product.sum())
        self.error += float(error.sum())
        changed = error != 0 if x.dim() > 1 else delta != 0
        if bool(changed.any()):
            # Rounding errors of nearly empty rows are large only next to the row itself.
            least = float(squares.mean()) * SMALL_ROW**2 + 1e-30
            relative = (error / squares.clamp_min(least)).sqrt()
            self.worst_row = max(self.worst_row, float(relative.nan_to_num(math.inf).max()))
            self.changed_rows += int(changed.sum())
            if self.first_changed is None:
                self.first_changed = self.rows + int(changed.to(torch.uint8).argmax())
        self.rows += len(x)
        self.count += x.numel()
        self.sum_a += float(sum_a.sum())
        self.sum_b += float(sum_b.sum())
        self.b_rounds = {name for name in self.b_rounds if _turns(name, x, y)}
        self.a_rounds = {name for name in self.a_rounds if _turns(name, y, x)}


def _turns(rounding: str, exact: Tensor, rounded: Tensor) -> bool:
    """Whether `rounding` turns one tensor into the other."""
    return all(
        torch.equal(ROUNDINGS[rounding](exact[rows]), rounded[rows])
        for rows in (slice(PROBED_ROWS), slice(None))
    )


def _by_row(values: Tensor) -> Tensor:
    """Rows of a matrix; a vector is one."""
    return values.flatten(1) if values.dim() > 1 else values[None]


def _ratio(square: float, of: float) -> float:
    if math.isnan(square) or math.isnan(of):
        return math.inf
    return math.sqrt(square / of) if of else math.inf if square else 0.0


def row_chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows with at most CHUNK_ELEMENTS values."""
    width = max(math.prod(shape[1:]), 1)
    step = max(CHUNK_ELEMENTS // width, 1)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def scan(a: CheckpointWeights, b: CheckpointWeights, name: str, other: str = "") -> WeightScan:
    """Compare the weight `name` of `b` with that of `a` (or with `other` of `a`).

    Equal weights cost one read of both; sums are computed only if they differ.
    """
    other = other or name
    shape = b.shapes[name]
    if all(_same(a.rows(other, *part), b.rows(name, *part)) for part in row_chunks(shape)):
        return WeightScan()
    sums = WeightScan(equal=False)
    for number, part in enumerate(row_chunks(shape)):
        if number == SUMMED_CHUNKS and _is_rounded(a, b, name, other, sums):
            break
        x, y = wide(a.rows(other, *part)), wide(b.rows(name, *part))
        kind = torch.promote_types(x.dtype, y.dtype)
        sums.add(x.to(kind), y.to(kind))
    return sums


def _is_rounded(
    a: CheckpointWeights, b: CheckpointWeights, name: str, other: str, sums: WeightScan
) -> bool:
    """Whether a rounding that turns the first rows of one weight into the other does so in all;
    then the sums of the first rows are enough.
    """
    for names, from_a in ((sums.b_rounds, True), (sums.a_rounds, False)):
        for rounding in [each for each in ROUNDINGS if each in names]:
            if all(
                _turns(rounding, *(pair if from_a else reversed(pair)))
                for part in row_chunks(b.shapes[name])
                for pair in [(wide(a.rows(other, *part)), wide(b.rows(name, *part)))]
            ):
                sums.b_rounds, sums.a_rounds = (
                    ({rounding}, set()) if from_a else (set(), {rounding})
                )
                return True
            names.discard(rounding)
    return False


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether all values are equal, NaNs included."""
    if x.dtype == y.dtype and torch.equal(_bits(x), _bits(y)):
        return True
    kind = torch.promote_types(x.dtype, y.dtype)
    return torch.equal(x.to(kind), y.to(kind))


def _bits(values: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(kinds[values.element_size()])
