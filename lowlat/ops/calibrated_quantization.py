"""int4 quantization with error feedback from the activations' covariance (GPTQ, arXiv 2210.17323).

With H = E[x x^T] of a projection's inputs (half the Hessian), the squared error of a row's output
is d H d^T, d being the change of its weights. Columns are rounded in order, and the error of each
is compensated by the columns after it: with U the upper Cholesky factor of H^-1
(H^-1 = U^T U), rounding column i by e_i U_ii moves the later columns by e_i U_ij, and the error is
the sum of e_i^2. Scale and minimum of a group are searched when its turn comes
(`weighted_quantization`), weighted by 1 / U_ii^2. A row whose error is larger than by min-max
ranges keeps those.

H is damped: DAMPING of its mean diagonal is added, which limits overfitting to few tokens. Rows do
not depend on one another, so results are the same for any number of threads. int8 uses the diagonal
of H only, because its error is negligible.
"""

from functools import cached_property, partial
from typing import Literal, final

import torch
from jaxtyping import Float, Float16, Float32
from torch import Tensor

from lowlat.ops import native, native_kernels
from lowlat.ops.quantized import (
    GROUP,
    INT4_MAX,
    Empty,
    Int4Weight,
    Int8Rows,
    Int8Weight,
    in_chunks,
    int4_groups,
    int4_values,
    min_max_range,
    pack_int4,
)
from lowlat.ops.weighted_quantization import (
    LOW_SHRINKS,
    REFITS,
    in_groups,
    int4_search,
    quantize_int4_weighted,
    quantize_int8_weighted,
    quantize_rows_weighted,
)

DAMPING = 0.1
"""Added to the diagonal of H, relative to its mean."""
CHUNK_ELEMENTS = 2**18
"""Elements quantized at a time; every column of a chunk takes several small operations."""
BLOCK = 128
"""Columns after which errors move all later columns; csrc/quantization.h holds as many."""


@final
class ActivationCovariance:
    """H = E[x x^T] of a projection's inputs."""

    def __init__(self, matrix: Float32[Tensor, "in in"]) -> None:
        self.matrix = matrix

    @cached_property
    def factor(self) -> Float32[Tensor, "in in"]:
        """Upper Cholesky factor of the inverse of the damped H, computed in fp64 on one thread."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            damped = self.matrix.double()
            mean = damped.diagonal().mean()
            damped.diagonal().add_(DAMPING * torch.where(mean > 0, mean, 1.0))
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
            return torch.linalg.cholesky(inverse, upper=True).float().contiguous()
        finally:
            torch.set_num_threads(threads)


Importance = Float32[Tensor, " in"] | ActivationCovariance
"""Weights of the errors in a projection's input channels: E[x^2], or E[x x^T]."""


def quantize_calibrated(
    dense: Float[Tensor, "out in"],
    storage: Literal["int4", "int8", "int8_rows"],
    importance: Importance,
    empty: Empty = torch.empty,
) -> Int4Weight | Int8Weight | Int8Rows:
    """`dense` quantized with least activation-weighted error; scales are non-finite where `dense`
    is, or exceeds the range of fp16.
    """
    if storage == "int4" and isinstance(importance, ActivationCovariance):
        chunk = partial(_chunk, factor=importance.factor)
        return Int4Weight(*in_chunks(dense, chunk, empty, CHUNK_ELEMENTS))
    if isinstance(importance, ActivationCovariance):
        importance = importance.matrix.diagonal()
    match storage:
        case "int4":
            return quantize_int4_weighted(dense, importance, empty)
        case "int8":
            return quantize_int8_weighted(dense, importance, empty)
        case "int8_rows":
            return quantize_rows_weighted(dense, importance, empty)


def _chunk(
    rows: Float32[Tensor, "padded_rows in"], factor: Float32[Tensor, "in in"]
) -> tuple[Tensor, Tensor, Tensor]:
    values, scale, minimum, error = _with_feedback(rows, factor)
    groups = int4_groups(rows)
    plain_scale, plain_minimum = min_max_range(groups)
    plain = int4_values(groups, plain_scale.float(), plain_minimum.float())
    plain.flatten(1)[:, rows.shape[1] :] = 0
    dequantized = plain * plain_scale.float()[..., None] + plain_minimum.float()[..., None]
    change = rows - dequantized.flatten(1)[:, : rows.shape[1]]
    is_worse = ~(error <= _feedback(change, factor).square().sum(1))[:, None]
    values = torch.where(is_worse[..., None], plain, values)
    scale = torch.where(is_worse, plain_scale, scale)
    return pack_int4(values, scale, torch.where(is_worse, plain_minimum, minimum))


def _with_feedback(
    rows: Float32[Tensor, "padded_rows in"], factor: Float32[Tensor, "in in"]
) -> tuple[Tensor, Tensor, Tensor, Float32[Tensor, " padded_rows"]]:
    """Values, scales and minima of all groups, and the error of each row. Errors move the columns
    of later blocks once per block (GPTQ's lazy updates).
    """
    columns, rows = rows.shape[1], rows.clone()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    error = rows.new_zeros(len(rows))
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        block, own = rows[:, first:last], factor[first:last, first:last]
        if native.available():
            found = native_kernels.feedback_block(block, own, LOW_SHRINKS, REFITS)
        else:
            found = feedback_block(block, own)
        q, scale, minimum, errors = found
        parts.append((q, scale, minimum))
        error += errors.square().sum(1)
        rows[:, last:].sub_(errors @ factor[first:last, last:])
    values, scales, minima = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return values, scales, minima, error


def feedback_block(
    rows: Float32[Tensor, "rows block"], factor: Float32[Tensor, "block block"]
) -> tuple[
    Float32[Tensor, "rows groups 32"],
    Float16[Tensor, "rows groups"],
    Float16[Tensor, "rows groups"],
    Float32[Tensor, "rows block"],
]:
    """Values, scales and minima of the groups of a block of columns, and the errors e of `rows` =
    dequantized + e U; `factor` is the block's part of U.
    """
    columns, rows, all_errors = rows.shape[1], rows.clone(), torch.empty_like(rows)
    values: list[Tensor] = []
    numbers: list[tuple[Tensor, Tensor]] = []
    for first in range(0, columns, GROUP):
        last = min(first + GROUP, columns)
        target, own = rows[:, first:last], factor[first:last, first:last]
        weights = in_groups(own.diagonal() ** -2)
        scale, minimum = (part[:, 0] for part in int4_search(int4_groups(target), weights))
        wide = scale.float()[:, None], minimum.float()[:, None]
        q = _rounded(target, *wide, own)
        errors = all_errors[:, first:last] = _feedback(target - (q * wide[0] + wide[1]), own)
        rows[:, last:] -= errors @ factor[first:last, last:]
        values.append(torch.nn.functional.pad(q, (0, GROUP - (last - first))))
        numbers.append((scale, minimum))
    scales, minima = (torch.stack(parts, dim=1) for parts in zip(*numbers, strict=True))
    return torch.stack(values, dim=1), scales, minima, all_errors


def _rounded(
    target: Float32[Tensor, "rows columns"],
    scale: Float32[Tensor, "rows 1"],
    minimum: Float32[Tensor, "rows 1"],
    factor: Float32[Tensor, "columns columns"],
) -> Float32[Tensor, "rows columns"]:
    """The q of one group, column by column. Rows that would not use the smallest or largest q are
    rounded without feedback, so that dequantized values are quantized again without loss.
    """
    left, q = target.clone(), torch.empty_like(target)
    for column in range(target.shape[1]):
        own = left[:, column : column + 1]
        q[:, column : column + 1] = int4_values(own, scale[:, 0], minimum[:, 0])
        missed = (own - (q[:, column : column + 1] * scale + minimum)) / factor[column, column]
        left[:, column + 1 :] -= missed * factor[column, column + 1 :]
    is_whole = (q.amin(1) == 0) & (q.amax(1) == INT4_MAX)
    plain = int4_values(target, scale[:, 0], minimum[:, 0])
    return torch.where(is_whole[:, None], q, plain)


def _feedback(
    change: Float32[Tensor, "rows columns"], factor: Float32[Tensor, "columns columns"]
) -> Float32[Tensor, "rows columns"]:
    """e with e U = change; the error d H d^T is the sum of e^2."""
    return torch.linalg.solve_triangular(factor, change, upper=True, left=False)
