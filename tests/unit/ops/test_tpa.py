"""The factored form of TPA equals the expanded one."""

import pytest
import torch
from torch import Tensor

from lowlat.ops import tpa
from lowlat.ops.attention import causal_attention
from lowlat.ops.tpa import FactorLayout, outer_mean

LAYOUT = FactorLayout(heads=5, head_dim=7, k_rank=3, v_rank=2)
ROW_DIM = (3 + 2) * (5 + 7)


def expanded(q: Tensor, rows: Tensor, start: int, scale: float) -> Tensor:
    keys, values = LAYOUT.expand(rows)
    return causal_attention(
        q, lambda first, last: (keys[first:last], values[first:last]), start=start, scale=scale
    )


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 29), (11, 11), (11, 29)])
@pytest.mark.parametrize("products", [2**23, 3 * 5 * 29, 1])
def test_factored_equals_expanded(
    queries: int, keys: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all queries at once, three at a time, and one by one."""
    monkeypatch.setattr(tpa, "PRODUCTS", products)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(queries, 5, 7, dtype=torch.float64, generator=generator)
    rows = torch.randn(keys, ROW_DIM, dtype=torch.float64, generator=generator)
    start = keys - queries
    found = LAYOUT.attend(q, rows, start=start, scale=0.7)
    torch.testing.assert_close(found, expanded(q, rows, start, 0.7), rtol=0, atol=1e-12)


def test_later_entries_are_masked() -> None:
    q, rows = torch.randn(2, 5, 7), torch.randn(9, ROW_DIM)
    changed = rows.clone()
    changed[8] = 100.0
    both = [LAYOUT.attend(q, r, start=7, scale=0.7) for r in (rows, changed)]
    assert torch.equal(both[0][0], both[1][0]) and not torch.equal(both[0][1], both[1][1])


def test_bf16_is_rounded_once() -> None:
    """Scores and sums are fp32: as near to fp64 as the rounding of the result."""
    q, rows = torch.randn(3, 5, 7).bfloat16(), torch.randn(31, ROW_DIM).bfloat16()
    found = LAYOUT.attend(q, rows, start=28, scale=0.7)
    assert found.dtype == torch.bfloat16
    exact = expanded(q.double(), rows.double(), 28, 0.7)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_the_mean_of_outer_products() -> None:
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 7)
    expected = sum(torch.outer(a[1, r], b[1, r]) for r in range(3)) / 3
    torch.testing.assert_close(outer_mean(a, b)[1], expected)
