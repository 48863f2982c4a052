"""Grouped GEMM of experts in training: the native kernels at every level against PyTorch."""

import pytest
import torch
from torch import Tensor

from lowlat.ops import native, native_training_kernels
from lowlat.ops.grouped import stacked_experts
from lowlat.ops.routing import route

from .test_training import DTYPES, LEVELS, MOE, close, draw

GROUPS = [
    ([3, 0, 1], 5, 7),
    ([0, 0], 33, 48),
    ([257, 0, 64, 1], 32, 96),
    ([513, 31], 40, 31),
    ([17], 129, 65),
]
"""Rows of each expert, out, in: widths that are no multiple of a vector, experts without rows, and
more rows than are held at once.
"""


def grouped_inputs(counts: list[int], out: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = sum(counts)
    left, right = (draw(rows, n, dtype=torch.bfloat16, seed=n) for n in (out, inner))
    return left, right, draw(len(counts), out, inner, dtype=torch.float32, seed=3)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("counts", "out", "inner"), GROUPS)
def test_native_products_of_groups(
    level: str,
    dtype: torch.dtype,
    is_transposed: bool,
    counts: list[int],
    out: int,
    inner: int,
) -> None:
    left, right, weight = grouped_inputs(counts, out, inner)
    weight = weight.to(dtype)
    rows = left if is_transposed else right
    found = native_training_kernels.grouped(
        rows, weight, torch.tensor(counts), is_transposed=is_transposed
    )
    exact = weight.bfloat16().double()
    matrices = exact if is_transposed else exact.transpose(1, 2)
    each = zip(rows.double().split(counts), matrices, strict=True)
    close(found, torch.cat([group @ matrix for group, matrix in each]), torch.bfloat16)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize(("counts", "out", "inner"), GROUPS)
def test_native_gradients_of_grouped_matrices(
    level: str, counts: list[int], out: int, inner: int
) -> None:
    left, right, _ = grouped_inputs(counts, out, inner)
    found = torch.full((len(counts), out, inner), float("nan"))
    native.module().outer(left, right, torch.tensor(counts), found)
    each = zip(left.double().split(counts), right.double().split(counts), strict=True)
    close(found, torch.stack([a.T @ b for a, b in each]), torch.float32)


def test_rows_that_are_not_finite_stay_with_their_expert() -> None:
    """Regression: what lies behind an expert's last row, or a row's last channel, times 0."""
    left, right, weight = grouped_inputs([3, 4, 2], 5, 7)
    left[3:7], right[3:7] = float("nan"), float("inf")
    counts = torch.tensor([3, 4, 2])
    products = native_training_kernels.grouped(right, weight, counts)
    assert products.isfinite().all(dim=1).tolist() == [True] * 3 + [False] * 4 + [True] * 2
    gradients = native_training_kernels.outer(left, right, counts)
    assert gradients.isfinite().flatten(1).all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("counts", [[3, 4], [3, 4, 3], [10, -1, 0]])
def test_groups_that_do_not_fit_the_rows_are_refused(counts: list[int]) -> None:
    left, right, weight = grouped_inputs([3, 4, 2], 5, 7)
    with pytest.raises(ValueError, match="counts"):
        native_training_kernels.grouped(right, weight[: len(counts)], torch.tensor(counts))
    with pytest.raises(ValueError, match="counts"):
        native_training_kernels.outer(left, right, torch.tensor(counts))


@pytest.mark.skipif(native.available() and native.level() != "avx512", reason="not the fastest")
@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_experts_by_native_products_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and all gradients, of fp32 weights under bf16 activations."""
    shapes = [(67, 48), (6, 48), (6, 64, 48), (6, 48, 32)]
    inputs = [draw(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]
    results = []
    for is_native in (True, False):
        if not is_native:
            monkeypatch.setattr(native_training_kernels, "multiplies_groups", lambda *_: False)
        leaves = [t.clone().requires_grad_() for t in inputs]
        routing = route(leaves[0], leaves[1], None, MOE)
        out = stacked_experts(leaves[0].bfloat16(), routing, *leaves[2:])
        out.float().square().sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    for found, wanted in zip(*results, strict=True):
        assert found is not None and wanted is not None
        close(found, wanted, torch.bfloat16)
