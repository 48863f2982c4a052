"""Index keys, index scores and the choice of sparse attention (DSA) at every level."""

import math

import pytest
import torch
from torch import Tensor

from lowlat.attention.index_tiles import read_int8_keys, write_int8_keys
from lowlat.attention.int8_entry import pack_entries, unpack_entries
from lowlat.config.kv_cache_size import index_key_bytes
from lowlat.ops.sparse_attention import IndexQueries, choose_tokens, index_scores, top_positions

from . import kernels
from .inputs import assert_same_bits, draw, every_level, needs_native, thread_count

pytestmark = needs_native

DIMS = (2, 18, 64, 128, 150)


def empty_cache(keys: int, width: int, page_size: int) -> Tensor:
    """Twice the pages that `keys` take, full of numbers that would be seen."""
    shape = (2 * -(-keys // page_size), page_size, index_key_bytes(width, "bf16"))
    return torch.full(shape, 0x7F, dtype=torch.uint8)


def paged(keys: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """A cache that holds the keys in shuffled pages, and the page table."""
    cache = empty_cache(len(keys), keys.shape[1], page_size)
    generator = torch.Generator().manual_seed(len(keys))
    pages = torch.randperm(len(cache), generator=generator)[: len(cache) // 2]
    position = torch.arange(len(keys))
    slots = pages[position // page_size] * page_size + position % page_size
    write_int8_keys(cache, slots, keys)
    return cache, pages.int()


def as_stored(rows: Tensor) -> Tensor:
    """Rows as an int8 cache returns them."""
    width = rows.shape[-1]
    packed = pack_entries(rows.flatten(0, -2), width, group=width)
    return unpack_entries(packed, width, width, torch.float32, group=width).view(rows.shape)


def small_integers(shape: tuple[int, ...], seed: int, most: int = 2) -> Tensor:
    """Numbers whose products and sums are exact, so that scores tie often."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).bfloat16()


def whole_scales(rows: Tensor, channel: int) -> Tensor:
    """Rows and two more channels, of which one holds 127 and the other 0: an int8 scale of 1."""
    ends = torch.zeros(*rows.shape[:-1], 2).bfloat16()
    ends[..., channel] = 127
    return torch.cat([rows, ends], dim=-1)


def exact_index(queries: int, heads: int, width: int, topk: int, seed: int) -> IndexQueries:
    weights = small_integers((queries, heads), seed + 1).float()
    q = whole_scales(small_integers((queries, heads, width - 2), seed), 0)
    return IndexQueries(q, weights, topk)


def drawn_index(queries: int, heads: int, width: int, topk: int) -> IndexQueries:
    weights = draw((queries, heads), "normal", 5).float()
    return IndexQueries(draw((queries, heads, width), "normal", 6), weights, topk)


@every_level
@pytest.mark.parametrize("width", DIMS)
def test_keys_are_stored_as_in_python(width: int, level: str) -> None:
    keys = draw((37, width), "wide", width)
    ours = empty_cache(37, width, 16)
    plain = ours.clone()
    kernels.store_index_keys(keys, ours, level=level)
    write_int8_keys(plain, torch.arange(37), keys)
    assert_same_bits(ours, plain)
    stored = read_int8_keys(ours, width, torch.float32)[:37]
    assert torch.equal(stored, as_stored(keys))
    bound = keys.float().abs().amax(dim=1, keepdim=True) / 254 * 1.001
    assert ((stored - keys.float()).abs() <= bound).all()


@every_level
@pytest.mark.parametrize("heads", [1, 3, 8, 40])
@pytest.mark.parametrize("page_size", [16, 48, 64])
def test_scores_and_choice_are_exact(heads: int, page_size: int, level: str) -> None:
    """Of sums that no rounding changes: the bits of the reference, with ties at and around 0, for
    queries that see one key more than they choose and for many."""
    width, topk = 64, 23
    for start, queries in ((topk, 1), (topk, 70), (201, 5), (1300, 2)):
        index = exact_index(queries, heads, width, topk, seed=start)
        keys = whole_scales(small_integers((start + queries, width - 2), seed=heads), 1)
        cache, pages = paged(keys, page_size)
        scores, chosen = kernels.choose_tokens(index, cache, pages, start=start, level=level)
        wanted = index_scores(index, keys)
        visible = torch.arange(start + queries) <= torch.arange(start, start + queries)[:, None]
        assert torch.equal(scores[visible], wanted[visible])
        assert torch.equal(chosen.long(), choose_tokens(index, keys, start=start))


@every_level
@pytest.mark.parametrize("topk", [1, 2, 5, 64, 700, 1999])
def test_the_choice_is_that_of_the_scores(topk: int, level: str) -> None:
    """Few and many of 2,000 scores: all different, of a few values, and all 0."""
    width, start = 64, 2000
    keys = draw((start + 2, width), "normal", topk)
    cache, pages = paged(keys, 64)
    for index in (drawn_index(2, 5, width, topk), exact_index(2, 1, width, topk, seed=3)):
        for weights in (index.weights, 0 * index.weights, -index.weights.abs()):
            own = index._replace(weights=weights)
            scores, chosen = kernels.choose_tokens(own, cache, pages, start=start, level=level)
            assert torch.equal(chosen.long(), top_positions(scores, start=start, topk=topk))


@every_level
@pytest.mark.parametrize("width", DIMS)
def test_scores_are_near_to_the_reference(width: int, level: str) -> None:
    index, keys = drawn_index(7, 9, width, 4), draw((150, width), "normal", 3)
    cache, pages = paged(keys, 64)
    scores, _ = kernels.choose_tokens(index, cache, pages, start=143, level=level)
    own = IndexQueries(as_stored(index.q).double(), index.weights.double(), index.topk)
    wanted = index_scores(own, as_stored(keys).double())
    seen = slice(0, 144)
    assert (scores[:, seen] - wanted[:, seen]).abs().max() < 1e-5 * wanted.abs().max()


@every_level
@pytest.mark.parametrize("width", [18, 128])
def test_int8_keys_choose_nearly_alike(width: int, level: str) -> None:
    index, keys = drawn_index(5, 8, width, 64), draw((1005, width), "normal", 3)
    rounded, chosen = kernels.choose_tokens(index, *paged(keys, 64), start=1000, level=level)
    plain = index_scores(index, keys)
    assert (rounded[:, :1001] - plain[:, :1001]).norm() < 0.02 * plain[:, :1001].norm()
    wanted = top_positions(plain, start=1000, topk=64)
    for one, other in zip(wanted.tolist(), chosen.tolist(), strict=True):
        assert len({*one} & {*other}) >= 60


@every_level
def test_a_score_that_is_not_a_number_is_chosen(level: str) -> None:
    """Infinite and undefined scores are the best, so that they reach the output."""
    keys = draw((90, 32), "normal", 1)
    keys[70] = math.nan
    cache, pages = paged(keys, 16)
    index = drawn_index(3, 2, 32, 4)
    scores, chosen = kernels.choose_tokens(index, cache, pages, start=87, level=level)
    assert (scores[:, 70] == math.inf).all() and (chosen == 70).any(dim=1).all()
    assert scores[:, :70].isfinite().all()


@every_level
@pytest.mark.parametrize("width", [128, 150])
def test_bits_depend_on_query_and_key_alone(width: int, level: str) -> None:
    """Not on the other queries, on pages or on threads."""
    start, count = 300, 67
    index, keys = drawn_index(count, 5, width, 40), draw((start + count, width), "normal", 2)
    cache, pages = paged(keys, 64)
    scores, chosen = kernels.choose_tokens(index, cache, pages, start=start, level=level)
    for first, last in ((0, 1), (1, 14), (14, 67)):
        part = IndexQueries(index.q[first:last], index.weights[first:last], index.topk)
        seen = start + last
        other, table = paged(keys[:seen], 16)
        with thread_count(3):
            own, choice = kernels.choose_tokens(
                part, other, table, start=start + first, level=level
            )
        for i in range(first, last):
            assert_same_bits(own[i - first, : start + i + 1], scores[i, : start + i + 1])
        assert torch.equal(choice, chosen[first:last])
