"""Blocked attention against a full score matrix, over drawn shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowlat.ops.attention import causal_attention


def naive(
    q: Tensor, k: Tensor, v: Tensor, *, start: int, scale: float, window: int | None = None
) -> Tensor:
    """softmax(scale q k^T) v with every score at once."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    query = torch.arange(start, start + len(q))[:, None]
    key = torch.arange(len(k))[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def blocked(q: Tensor, k: Tensor, v: Tensor, **options: float | int | None) -> Tensor:
    return causal_attention(q, lambda first, last: (k[first:last], v[first:last]), **options)


def draw(queries: int, keys: int, heads: int, kv_heads: int, d_qk: int, d_v: int) -> list[Tensor]:
    shapes = [(queries, heads, d_qk), (keys, kv_heads, d_qk), (keys, kv_heads, d_v)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 13),
    start=st.integers(0, 19),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 5]),
    d_qk=st.sampled_from([1, 3, 8]),
    d_v=st.sampled_from([1, 5, 7]),
    window=st.none() | st.integers(1, 23),
    key_block=st.integers(1, 11),
    query_block=st.integers(1, 7),
    seed=st.integers(0, 2**16),
)
def test_equals_the_full_matrix(
    queries: int,
    start: int,
    kv_heads: int,
    group: int,
    d_qk: int,
    d_v: int,
    window: int | None,
    key_block: int,
    query_block: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    q, k, v = draw(queries, start + queries, kv_heads * group, kv_heads, d_qk, d_v)
    options = {"start": start, "scale": 0.7, "window": window}
    out = blocked(q, k, v, **options, key_block=key_block, query_block=query_block)
    torch.testing.assert_close(out, naive(q, k, v, **options), rtol=0, atol=1e-12)


def test_first_query_sees_only_itself() -> None:
    q, k, v = draw(3, 3, 2, 2, 5, 7)
    torch.testing.assert_close(blocked(q, k, v, start=0, scale=1.0)[0], v[0])


def test_window_of_one_returns_the_own_value() -> None:
    """Regression: a window that does not count the query itself, or one token too many."""
    q, k, v = draw(5, 16, 6, 2, 3, 7)
    out = blocked(q, k, v, start=11, scale=1.0, window=1, key_block=4)
    torch.testing.assert_close(out, v[11:].repeat_interleave(3, dim=1))


def test_keys_outside_the_window_are_not_computed() -> None:
    asked = []
    q, k, v = draw(3, 103, 2, 1, 3, 5)

    def key_values(first: int, last: int) -> tuple[Tensor, Tensor]:
        asked.append((first, last))
        return k[first:last], v[first:last]

    causal_attention(q, key_values, start=100, scale=1.0, window=7, key_block=5)
    assert asked == [(94, 99), (99, 103)]


@pytest.mark.parametrize("key_block", [2, 4, 64])
def test_huge_scores_do_not_overflow(key_block: int) -> None:
    """The online softmax subtracts the largest score; exp(1e4) alone is infinite."""
    q, k, v = draw(7, 11, 2, 1, 3, 5)
    out = blocked(q * 1e4, k, v, start=4, scale=1.0, key_block=key_block)
    torch.testing.assert_close(out, naive(q * 1e4, k, v, start=4, scale=1.0))


def test_narrow_inputs_are_scored_in_fp32() -> None:
    """Regression: scores or probabilities rounded to bf16 on the way; only the result is."""
    q, k, v = (x.to(torch.bfloat16) for x in draw(13, 29, 4, 2, 16, 11))
    out = blocked(q, k, v, start=16, scale=0.25, key_block=8)
    exact = naive(q.double(), k.double(), v.double(), start=16, scale=0.25)
    assert out.dtype == torch.bfloat16
    moved = (out != exact.to(torch.bfloat16)).double().mean()
    assert moved < 0.01


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_equal_those_of_the_full_matrix(window: int | None) -> None:
    """Rows that see nothing of their first key block pass -inf through the online softmax: no NaN
    may follow.
    """
    inputs = [x.requires_grad_() for x in draw(9, 14, 4, 2, 5, 3)]
    weight = torch.randn(9, 4, 3, dtype=torch.float64)
    options = {"start": 5, "scale": 0.4, "window": window}
    out = blocked(*inputs, **options, key_block=3, query_block=9)
    mine = torch.autograd.grad((out * weight).sum(), inputs)
    reference = torch.autograd.grad((naive(*inputs, **options) * weight).sum(), inputs)
    for got, expected in zip(mine, reference, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
