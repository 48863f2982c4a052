"""Paged attention at every level, against the exact softmax."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowlat.attention.int8_entry import pack_entries, unpack_entries
from lowlat.ops.attention import causal_attention

from . import kernels
from .inputs import (
    BF16_UNIT,
    UNIT,
    assert_same_bits,
    assert_within,
    draw,
    every_level,
    needs_native,
    thread_count,
)

pytestmark = needs_native

few = settings(max_examples=40, deadline=None)
page_sizes = st.sampled_from([1, 7, 16, 64])
starts = st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 1023, 1024, 1100, 2050]))
seeds = st.integers(0, 1000)
NOWHERE = 113.0
"""Contents of masked entries, as numbers and as bytes."""
WHOLE = [(64, 32), (80, 16), (32, 0)]
"""Latent and rotary channels, together a multiple of 32: keys that whole query tiles (one query per
lane) read row-major."""
INTEGER_LEVELS = {"avx512"}
"""Levels that score int8 latents by integer products."""


def paged(rows: Tensor, page_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The entries in shuffled pages among others, and the page table."""
    count = -(-len(rows) // page_size)
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(2 * count, generator=generator)[:count].int()
    cache = rows.new_full((2 * count * page_size, rows.shape[1]), NOWHERE)
    position = torch.arange(len(rows))
    cache[pages[position // page_size].long() * page_size + position % page_size] = rows
    return cache.unflatten(0, (-1, page_size)), pages


def check(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    scale: float,
    window: int | None,
    rounding: Tensor | float = 0.0,
) -> None:
    """Compare with causal_attention in fp64 over keys [rows, kv_heads, d] and values; `rounding` is
    what may come on top.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(
            q.double(),
            lambda a, b: (k[a:b].double(), v[a:b].double()),
            start=start,
            scale=scale,
            window=window,
        )

    exact, around = attend(q, k, v), attend(q, k, v.abs())
    # Weights are rounded to bf16, and a score carries the rounding errors of its sum.
    products = scale * q.double().abs().amax() * k.double().abs().amax() * q.shape[2]
    relative = 2 * BF16_UNIT + 2 * (q.shape[2] + 8) * UNIT * products + 1e-5
    assert_within(out, exact, relative * around + BF16_UNIT * exact.abs() + rounding)


@every_level
@few
@given(
    queries=st.integers(0, 9),
    heads=st.integers(1, 20),
    widths=st.one_of(st.tuples(st.integers(1, 90), st.integers(0, 30)), st.sampled_from(WHOLE)),
    start=starts,
    page_size=page_sizes,
    seed=seeds,
)
def test_mla(
    level: str,
    queries: int,
    heads: int,
    widths: tuple[int, int],
    start: int,
    page_size: int,
    seed: int,
) -> None:
    latent, rope_dim = widths
    rows = draw((start + queries, latent + rope_dim), "normal", seed)
    q = draw((queries, heads, latent + rope_dim), "normal", seed + 1)
    cache, pages = paged(rows, page_size, seed)
    scale = rows.shape[1] ** -0.5
    out = kernels.mla_attention(
        q, cache, pages, latent=latent, start=start, scale=scale, level=level
    )
    if queries:
        check(out, q, rows[:, None], rows[:, None, :latent], start, scale, None)


def as_integers_read_it(q: Tensor, quantized: int) -> Tensor:
    """Queries with `quantized` channels rounded to int8 in groups of 64 and dequantized."""
    flat = q.flatten(0, 1)
    packed = pack_entries(flat, quantized)
    return unpack_entries(packed, q.shape[2], quantized, torch.float32).view_as(q)


def byte_rounding(
    q: Tensor, keys: Tensor, integers: Tensor, scales: Tensor, scale: float, window: int | None
) -> Tensor:
    """Six standard deviations of the errors of attended values [queries, heads, d] where softmax
    weights, times the scales of a key's groups, are rounded to 254ths of the largest there could be
    in a span of keys, at random: a standard deviation of half a step for each key. The values are
    `integers` [keys, d] times `scales` [keys, d].
    """
    queries, count = len(q), len(keys)
    scores = torch.einsum("qhd,kd->qhk", q.double(), keys.double()) * scale
    seen = torch.ones(queries, count).tril(count - queries)
    if window is not None:
        seen = seen.triu(count - queries - window + 1)
    weights = scores.masked_fill(seen[:, None] == 0, -torch.inf).softmax(dim=-1)
    variance = torch.zeros(*q.shape[:2], integers.shape[1], dtype=torch.float64)
    for first, last in pairwise([0, 64, *range(128, count + 128, 128)]):
        part = slice(first, last)
        if first < count:
            step = weights[..., part].amax(dim=-1, keepdim=True) * scales[part].amax(dim=0) / 254
            variance += step**2 * integers[part].double().square().sum(dim=0)
    return 3 * variance.sqrt()


def integers_and_scales(packed: Tensor, quantized: int) -> tuple[Tensor, Tensor]:
    """The int8 channels [keys, quantized] and the scale of each, fp64."""
    at, groups = -(-quantized // 4) * 4, -(-quantized // 64)
    scales = packed[:, at : at + 4 * groups].contiguous().view(torch.float32).double()
    of_channel = torch.arange(quantized) // 64
    return packed[:, :quantized].view(torch.int8), scales[:, of_channel]


@every_level
@pytest.mark.parametrize("whole", [False, True], ids=["latent", "whole row"])
@few
@given(
    queries=st.integers(1, 9),
    heads=st.integers(1, 40),
    latent=st.integers(1, 200),
    pairs=st.integers(0, 20),
    start=starts,
    page_size=page_sizes,
    seed=seeds,
)
def test_mla_over_int8(
    level: str,
    whole: bool,
    queries: int,
    heads: int,
    latent: int,
    pairs: int,
    start: int,
    page_size: int,
    seed: int,
) -> None:
    width = latent + 2 * pairs
    quantized = width if whole else latent
    packed = pack_entries(draw((start + queries, width), "normal", seed), quantized)
    q = draw((queries, heads, width), "normal", seed + 1)
    cache, pages = paged(packed, page_size, seed)
    scale = width**-0.5
    out = kernels.mla_attention(
        q,
        cache,
        pages,
        latent=latent,
        start=start,
        scale=scale,
        quantized=quantized,
        level=level,
    )
    rounding: Tensor | float = 0.0
    if level in INTEGER_LEVELS:
        rows = unpack_entries(packed, width, quantized, torch.float32)
        q = as_integers_read_it(q, quantized)
        integers, scales = integers_and_scales(packed, quantized)
        rounding = byte_rounding(q, rows, integers[:, :latent], scales[:, :latent], scale, None)
    else:
        rows = unpack_entries(packed, width, quantized, torch.bfloat16)
    check(out, q, rows[:, None], rows[:, None, :latent], start, scale, None, rounding)


class GqaCase(NamedTuple):
    queries: int
    kv_heads: int
    group: int
    dim: int
    start: int
    page_size: int
    window: int | None
    seed: int


def gqa_cases(groups: list[int], dims: st.SearchStrategy[int]) -> st.SearchStrategy[GqaCase]:
    return st.builds(
        GqaCase,
        queries=st.integers(1, 9),
        kv_heads=st.integers(1, 3),
        group=st.sampled_from(groups),
        dim=dims,
        start=starts,
        page_size=page_sizes,
        window=st.one_of(st.none(), st.integers(1, 1200)),
        seed=seeds,
    )


@every_level
@few
@given(
    case=gqa_cases(
        groups=[1, 2, 3, 4, 5, 8, 16],
        dims=st.one_of(st.integers(1, 70), st.sampled_from([32, 64])),
    )
)
def test_gqa(level: str, case: GqaCase) -> None:
    queries, kv_heads, group, dim, start, page_size, window, seed = case
    rows = draw((start + queries, 2 * kv_heads * dim), "normal", seed)
    q = draw((queries, kv_heads * group, dim), "normal", seed + 1)
    cache, pages = paged(rows, page_size, seed)
    scale = dim**-0.5
    out = kernels.gqa_attention(
        q, cache, pages, kv_heads=kv_heads, start=start, scale=scale, window=window, level=level
    )
    k, v = rows.unflatten(1, (2, kv_heads, dim)).unbind(1)
    check(out, q, k, v, start, scale, window)


@every_level
@few
@given(case=gqa_cases(groups=[1, 3, 8, 16, 20], dims=st.sampled_from([20, 64, 96, 128])))
def test_gqa_over_int8(level: str, case: GqaCase) -> None:
    """Integer products apply if a head's keys and values begin at scale-group boundaries."""
    queries, kv_heads, group, dim, start, page_size, window, seed = case
    width = 2 * kv_heads * dim
    packed = pack_entries(draw((start + queries, width), "normal", seed), width)
    q = draw((queries, kv_heads * group, dim), "normal", seed + 1)
    cache, pages = paged(packed, page_size, seed)
    scale = dim**-0.5
    out = kernels.gqa_attention(
        q, cache, pages, kv_heads=kv_heads, start=start, scale=scale, window=window, level=level
    )
    exact = unpack_entries(packed, width, width, torch.float32).unflatten(1, (2, kv_heads, dim))
    plain = exact.bfloat16()
    integers, scales = (
        each.unflatten(1, (2, kv_heads, dim)) for each in integers_and_scales(packed, width)
    )
    for head in range(kv_heads):
        own = slice(head * group, (head + 1) * group)
        starts_at = head * dim, (kv_heads + head) * dim
        fits = all(at % 64 == 0 for at in starts_at)
        rows, asked, rounding = plain[:, :, head], q[:, own], 0.0
        if level in INTEGER_LEVELS and fits:
            rows, asked = exact[:, :, head], as_integers_read_it(q[:, own], dim)
            rounding = byte_rounding(
                asked, rows[:, 0], integers[:, 1, head], scales[:, 1, head], scale, window
            )
        k, v = rows[:, :1], rows[:, 1:]
        check(out[:, own], asked, k, v, start, scale, window, rounding)


@every_level
@pytest.mark.parametrize(("width", "heads"), [(40, 2), (64, 16)])
def test_scores_of_any_size(level: str, width: int, heads: int) -> None:
    """Scores of thousands choose one key; equal scores of any size mean all alike."""
    rows = torch.zeros(200, width, dtype=torch.bfloat16)
    rows[:, :32] = draw((200, 32), "normal", 1)
    rows[150, 39] = 100.0
    q = torch.zeros(1, heads, width, dtype=torch.bfloat16)
    q[0, 0, 39], q[0, 1, 39] = 100.0, -100.0
    cache, pages = paged(rows, 16, 1)
    out = kernels.mla_attention(q, cache, pages, latent=32, start=199, scale=1.0, level=level)
    assert torch.equal(out[0, 0], rows[150, :32])
    others = torch.cat([rows[:150, :32], rows[151:, :32]]).double()
    assert_within(out[0, 1], others.mean(dim=0), 2 * BF16_UNIT * others.abs().mean(dim=0))


def stored(rows: Tensor, quantized: int) -> Tensor:
    """The entries as the cache stores them, the first `quantized` channels in int8."""
    return pack_entries(rows, quantized) if quantized else rows


@every_level
@pytest.mark.parametrize("quantized", [0, 32, 40], ids=["bf16", "latent", "whole row"])
@pytest.mark.parametrize("width", [40, 64])
def test_nan_stays_with_those_who_see_it(level: str, width: int, quantized: int) -> None:
    rows = draw((90, width), "normal", 1)
    rows[70] = torch.nan
    q = draw((20, 3, width), "normal", 2)
    cache, pages = paged(stored(rows, quantized), 16, 1)
    out = kernels.mla_attention(
        q, cache, pages, latent=32, start=60, scale=0.2, quantized=quantized, level=level
    )
    assert out[:10].isfinite().all()
    assert out[10:].isnan().all()


@every_level
@pytest.mark.parametrize("quantized", [0, 32, 40], ids=["bf16", "latent", "whole row"])
@pytest.mark.parametrize("start", [64, 70, 128])
def test_nan_comes_through_where_a_split_holds_nothing_else(
    level: str, start: int, quantized: int
) -> None:
    rows = draw((start + 2, 40), "normal", 1)
    rows[start // 64 * 64 :] = torch.nan
    q = draw((2, 3, 40), "normal", 2)
    cache, pages = paged(stored(rows, quantized), 16, 1)
    out = kernels.mla_attention(
        q, cache, pages, latent=32, start=start, scale=0.2, quantized=quantized, level=level
    )
    assert out.isnan().all()


@every_level
@pytest.mark.parametrize("quantized", [0, 64, 72], ids=["bf16", "latent", "whole row"])
@pytest.mark.parametrize("sharpness", [0.1, 2.0])
@pytest.mark.parametrize("width", [72, 96])
def test_queries_stand_alone(level: str, width: int, sharpness: float, quantized: int) -> None:
    """A query's bits depend neither on its neighbours, nor on pages, nor on threads: groups of
    some sizes have a lane for each row of queries, where keys are of whole pieces, others not; some
    queries give single keys much, others little."""
    rows, q = draw((1300, width), "normal", 1), draw((20, 5, width), "normal", 2)
    q[:, ::2] /= 8

    def attend(first: int, count: int, page_size: int) -> Tensor:
        cache, pages = paged(stored(rows, quantized), page_size, page_size)
        return kernels.mla_attention(
            q[first : first + count],
            cache,
            pages,
            latent=64,
            start=1280 + first,
            scale=sharpness,
            quantized=quantized,
            level=level,
        )

    together = attend(0, 20, 16)
    for first in range(20):
        assert_same_bits(attend(first, 1, 7), together[first : first + 1])
    for count in (1, 3):
        with thread_count(count):
            assert_same_bits(attend(0, 20, 64), together)


@every_level
@pytest.mark.parametrize(
    ("strong", "weak", "within"), [(16.0, 0.01, 0.1), (1024.0, 0.5, 0.02)], ids=["spread", "peak"]
)
def test_weak_keys_keep_their_sum(level: str, strong: float, weak: float, within: float) -> None:
    """int8 values, one large weight and many below half a quantization step: none is lost where it
    matters, and elsewhere their sum is preserved.
    """
    latent, count, last = 64, 1024, 896
    weights = torch.ones(count)
    weights[last:] = weak
    weights[last + 5] = strong
    rows = torch.zeros(count, latent + 2)
    rows[last:, :latent] = 1.0
    rows[last + 5, :latent] = 0.0
    rows[:, latent] = weights.log()
    rows = rows.bfloat16()
    q = torch.zeros(1, 16, latent + 2, dtype=torch.bfloat16)
    q[..., latent] = 1.0
    cache, pages = paged(pack_entries(rows, latent), 64, 1)
    out = kernels.mla_attention(
        q, cache, pages, latent=latent, start=count - 1, scale=1.0, quantized=latent, level=level
    )
    exact = rows[:, latent].double().exp()
    share = (exact[last:].sum() - exact[last + 5]) / exact.sum()
    assert (out.double() / share - 1).abs().max() < within
