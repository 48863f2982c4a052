"""Rounding of a whole weight: to another data type, or to blocks that share a scale."""

import re

import torch
from torch import Tensor

from lowlat.compare.weights.finding import Explanation, Label
from lowlat.compare.weights.scan import ROUNDINGS, WeightScan

EXACT = 2.0**-7
"""Largest relative difference of a weight that was also rounded to bf16 or fp16."""
BY_BITS = {8: 0.03, 6: 0.06, 5: 0.1, 4: 0.2, 3: 0.35, 2: 0.6, 1: 0.8}
"""Largest relative difference of a weight in blocks, by the bits of its values."""
FP8 = 0.06
WORST_ROW = 2.5
"""Largest relative difference of a row, as a multiple of that of the weight."""
SEGMENT = 32
"""Adjacent values that share a scale in every block format compared here."""
LEVELS_INT4 = 16
SAMPLED_ROWS = 64
STEP_ERROR = 0.3
"""Largest distance from an int8 step, in steps: values may have been rounded to bf16 after it."""


def limit_of(stored: str) -> float:
    """Largest relative difference that storage as `stored` ('bf16', 'fp8', 'Q4_K') causes."""
    if stored == "fp8":
        return FP8
    found = re.search(r"^(?:int|I?Q|MXFP|NVFP|TQ)(\d)", stored)
    return BY_BITS.get(int(found[1]), BY_BITS[1]) if found else EXACT


def exact_rounding(found: WeightScan) -> Explanation | None:
    """Rounding of single numbers that turns one weight into the other."""
    sides: list[tuple[Label, Label, set[str]]] = [
        ("B", "A", found.b_rounds),
        ("A", "B", found.a_rounds),
    ]
    for label, other, names in sides:
        for name in ROUNDINGS:
            if name in names:
                return Explanation("rounding", f"has {other}'s values {name}", label)
    return None


def stored_rounding(found: WeightScan, a: str, b: str) -> Explanation | None:
    """Rounding to the blocks in which the files store the weight: `a` and `b` are their types."""
    limit = max(limit_of(a), limit_of(b))
    if limit == EXACT or not found.relative <= limit or found.worst_row > WORST_ROW * limit:
        return None
    if limit_of(b) >= limit_of(a):
        return Explanation("rounding", f"stores {b}, A stores {a}")
    return Explanation("rounding", f"stores {a}, B stores {b}", "A")


def block_rounding(a: Tensor, b: Tensor, relative: float) -> Explanation | None:
    """Rounding to blocks that was undone when the file was written; a, b: [rows, columns] or a
    sample of their rows, `relative` their difference.
    """
    if relative > BY_BITS[4] or a.dim() != 2:
        return None
    pairs: list[tuple[Label, Tensor, Tensor]] = [("B", a, b), ("A", b, a)]
    for label, exact, rounded in pairs:
        how = _blocks(rounded[:SAMPLED_ROWS])
        if how and not _blocks(exact[:SAMPLED_ROWS]) and relative <= limit_of(how.split()[0]):
            other = "A" if label == "B" else "B"
            return Explanation("rounding", f"has {other}'s values rounded to {how}", label)
    return None


def _blocks(values: Tensor) -> str:
    """The block format on whose steps all values lie: 'fp8', 'int8 ...', 'int4 ...' or ''."""
    width = values.shape[1]
    if width < SEGMENT or not bool(values.isfinite().all()):
        return ""
    for size in dict.fromkeys((SEGMENT, 64, 128, width)):
        blocks = _segments(values, size)
        if any(_on_int8_steps(blocks, top) for top in (127.0, 128.0)):
            return f"int8 blocks of {size}" if size < width else "int8, one scale per row"
    segments = _segments(values, SEGMENT)
    if _on_int4_steps(segments):
        return "int4 blocks"
    return "fp8 (e4m3) blocks" if _on_fp8_steps(segments) else ""


def _segments(values: Tensor, size: int) -> Tensor:
    """[n, size]: whole blocks of the rows, without those that are all zero."""
    whole = values.shape[1] // size * size
    blocks = values[:, :whole].reshape(-1, size)
    return blocks[blocks.abs().amax(dim=1) > 0]


def _on_int8_steps(blocks: Tensor, top: float) -> bool:
    if not len(blocks):
        return False
    steps = blocks / (blocks.abs().amax(dim=1, keepdim=True) / top)
    return bool(((steps - steps.round()).abs() <= STEP_ERROR).all())


def _on_int4_steps(blocks: Tensor) -> bool:
    """At most 16 different values in every block of 32."""
    if not len(blocks):
        return False
    ordered = blocks.sort(dim=1).values
    apart = ordered.diff(dim=1) > 2.0**-7 * blocks.abs().amax(dim=1, keepdim=True)
    return bool((apart.sum(dim=1) < LEVELS_INT4).all())


def _on_fp8_steps(blocks: Tensor) -> bool:
    """Significands of four bits after division by a scale: one of 8, by that of the largest."""
    if not len(blocks):
        return False
    sizes = blocks.abs()
    top = sizes.amax(dim=1, keepdim=True)
    sizes = torch.where(sizes < top * 2.0**-13, top, sizes)  # below e4m3's normal numbers
    fits = torch.zeros(len(blocks), dtype=torch.bool)
    for significand in range(8, 16):
        fraction = (sizes / top * significand).frexp().mantissa * 16
        fits |= ((fraction - fraction.round()).abs() <= 2.0**-3).all(dim=1)
    return bool(fits.all())
