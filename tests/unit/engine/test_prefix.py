"""The prefix cache: hits, misses, isolation and order of eviction."""

import hashlib
from collections.abc import Sequence

import pytest

from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.prefix import Digest, PrefixCache
from tests.page_driver import Driver

NAMESPACE = b"key"
LONG = list(range(100, 112))
"""Four pages of three tokens."""


def cache_for(
    num_pages: int = 8, digest: Digest | None = None
) -> tuple[PageAllocator, PrefixCache]:
    allocator = PageAllocator(num_pages)
    return allocator, PrefixCache(allocator, page_size=3, digest=digest)


def paths(tokens: Sequence[int], path: str = "decode") -> list[str]:
    return [path] * (len(tokens) // 3)


def put(
    allocator: PageAllocator,
    cache: PrefixCache,
    tokens: Sequence[int],
    cache_namespace: bytes = NAMESPACE,
) -> list[int]:
    """Pages of a running sequence whose full pages are indexed."""
    pages = allocator.allocate(-(-len(tokens) // 3))
    cache.insert(cache_namespace, tokens, paths(tokens), pages)
    return pages


def found(
    allocator: PageAllocator,
    cache: PrefixCache,
    tokens: Sequence[int],
    cache_namespace: bytes = NAMESPACE,
    **path: str,
) -> list[int]:
    pages = cache.match(cache_namespace, tokens, paths(tokens, **path))
    allocator.release(pages)
    return pages


def one_key(data: bytes) -> bytes:
    """Every page's key is the same."""
    return b"same"


def low_bits(data: bytes) -> bytes:
    """Keys that collide often."""
    return bytes([hashlib.sha256(data).digest()[0] & 15])


# What is found


def test_the_longest_indexed_prefix_is_found_and_retained() -> None:
    allocator, cache = cache_for()
    pages = put(allocator, cache, LONG)
    allocator.release(pages)
    assert (allocator.num_cached, allocator.num_used) == (4, 0)
    matched = cache.match(NAMESPACE, [*LONG[:8], 7, 7, 7], ["decode"] * 3)
    assert matched == pages[:2]
    assert (allocator.num_cached, allocator.num_used) == (2, 2)
    assert allocator.allocate(6) == [4, 5, 6, 7, *pages[2:]]
    cache.check_integrity([matched, [4, 5, 6, 7, *pages[2:]]])


def test_pages_in_use_are_shared() -> None:
    allocator, cache = cache_for()
    pages = put(allocator, cache, LONG)
    assert cache.match(NAMESPACE, LONG, paths(LONG)) == pages
    assert all(allocator.is_shared(page) for page in pages)
    cache.check_integrity([pages, pages])


def test_only_as_many_pages_as_paths_are_looked_up() -> None:
    """Regression: a prompt that hits completely, which leaves no token to take logits from."""
    allocator, cache = cache_for()
    pages = put(allocator, cache, LONG)
    assert cache.match(NAMESPACE, LONG, paths(LONG[:-1])) == pages[:3]


def test_a_partly_filled_page_is_not_indexed() -> None:
    allocator, cache = cache_for()
    allocator.release(put(allocator, cache, LONG[:5]))
    assert (allocator.num_cached, allocator.num_free, len(cache)) == (1, 7, 1)


def test_a_growing_sequence_indexes_page_after_page() -> None:
    allocator, cache = cache_for()
    pages: list[int] = []
    for length in range(1, len(LONG) + 1):
        if length % 3 == 1:
            pages += allocator.allocate(1)
        cache.insert(NAMESPACE, LONG[:length], paths(LONG[:length]), pages)
        assert len(cache) == length // 3
    assert found(allocator, cache, LONG) == pages


def test_a_growing_sequence_costs_only_its_new_pages() -> None:
    """Regression: the whole prompt hashed again for each page that decoding fills."""
    calls: list[bytes] = []

    def counting(data: bytes) -> bytes:
        calls.append(data)
        return hashlib.sha256(data).digest()

    allocator, cache = cache_for(200, counting)
    tokens = list(range(300))
    pages = allocator.allocate(101)
    cache.insert(NAMESPACE, tokens, paths(tokens), pages)
    calls.clear()
    cache.insert(NAMESPACE, tokens, paths(tokens), pages)
    assert len(calls) == 0
    tokens += [1, 2, 3]
    cache.insert(NAMESPACE, tokens, paths(tokens), pages)
    assert len(calls) == 1 and len(cache) == 101


def test_counters_are_in_tokens_and_pages() -> None:
    allocator, cache = cache_for(4)
    allocator.release(put(allocator, cache, LONG))
    found(allocator, cache, LONG[:7])
    found(allocator, cache, [1, 2, 3, 4])
    assert (cache.queried_tokens, cache.hit_tokens, cache.evictions) == (11, 6, 0)
    allocator.release(allocator.allocate(3))
    assert cache.evictions == 3
    cache.clear()
    assert cache.evictions == 4 and len(cache) == 0


# Pages of equal rows


def test_a_duplicate_page_is_released_for_the_indexed_one() -> None:
    """Two sequences computed the same prefix concurrently: one copy stays."""
    allocator, cache = cache_for(10)
    first, second = allocator.allocate(4), allocator.allocate(4)
    cache.insert(NAMESPACE, LONG, paths(LONG), first)
    other = [*LONG[:6], 1, 2, 3, 4]
    cache.insert(NAMESPACE, other, paths(other), second)
    assert second[:2] == first[:2] and second[2:] == [6, 7]
    assert allocator.num_used == 6
    cache.check_integrity([first, second])
    # What follows the shared pages is known too, and outlived by them.
    allocator.release(first)
    cache.check_integrity([second])
    allocator.release(second)
    assert found(allocator, cache, other) == second[:3]
    assert found(allocator, cache, LONG) == first


def test_pages_that_were_shared_before_they_were_indexed_stay_out() -> None:
    """Regression: a page indexed as the successor of one that its other holder does not hold, which
    could be evicted first."""
    allocator, cache = cache_for()
    known = put(allocator, cache, LONG[:3])
    pages = allocator.allocate(2)
    sibling = list(pages)
    allocator.retain(sibling)
    cache.insert(NAMESPACE, LONG[:6], paths(LONG[:6]), pages)
    assert pages == sibling and len(cache) == 1
    allocator.release(pages)
    cache.insert(NAMESPACE, LONG[:6], paths(LONG[:6]), sibling)
    assert sibling[0] == known[0] and len(cache) == 2
    cache.check_integrity([known, sibling])


# What is never found


def test_namespaces_share_nothing() -> None:
    allocator, cache = cache_for()
    put(allocator, cache, LONG, cache_namespace=b"mine")
    assert found(allocator, cache, LONG, cache_namespace=b"yours") == []
    assert found(allocator, cache, LONG, cache_namespace=b"") == []
    other = put(allocator, cache, LONG, cache_namespace=b"yours")
    assert set(other) == {4, 5, 6, 7}


def test_entries_of_another_path_are_not_found() -> None:
    allocator, cache = cache_for()
    pages = put(allocator, cache, LONG)
    assert found(allocator, cache, LONG, path="expanded") == []
    assert cache.match(NAMESPACE, LONG, ["decode", "decode", "expanded", "decode"]) == pages[:2]


def test_the_end_of_a_path_is_not_the_beginning_of_the_tokens() -> None:
    """Regression: equal keys of different (path, tokens), the path being of any length."""
    seen: list[bytes] = []

    def recording(data: bytes) -> bytes:
        seen.append(data)
        return hashlib.sha256(data).digest()

    _, cache = cache_for(digest=recording)
    a = int.from_bytes(b"aaaa", "little")
    cache.match(NAMESPACE, [a, a, a], ["f"])
    cache.match(NAMESPACE, [a, a, a], ["faaaa"])
    assert len({data[: len(seen[1])] for data in seen if len(data) > len(NAMESPACE)}) == 2


def test_equal_tokens_after_other_tokens_are_not_found() -> None:
    allocator, cache = cache_for()
    put(allocator, cache, LONG)
    assert found(allocator, cache, LONG[3:]) == []
    assert found(allocator, cache, [0, *LONG[1:]]) == []


@pytest.mark.parametrize(
    ("cache_namespace", "tokens", "path"),
    [
        (NAMESPACE, [9, *LONG[1:]], "decode"),
        (NAMESPACE, [*LONG[:2], 9], "decode"),
        (NAMESPACE, LONG[:3], "expanded"),
        (b"other", LONG[:3], "decode"),
    ],
)
def test_hash_collisions_do_not_expose_other_entries(
    cache_namespace: bytes, tokens: list[int], path: str
) -> None:
    """Regression: trust in the hash alone. Here all keys are equal, and only the compared content
    differs."""
    allocator, cache = cache_for(digest=one_key)
    pages = put(allocator, cache, LONG[:3])
    assert found(allocator, cache, LONG[:3]) == pages
    assert found(allocator, cache, tokens, cache_namespace, path=path) == []
    mine = allocator.allocate(1)
    cache.insert(cache_namespace, tokens[:3], [path], mine)
    assert mine == [1] and found(allocator, cache, LONG[:3]) == pages
    cache.check_integrity([pages, mine])


def test_hash_collisions_do_not_expose_another_parent() -> None:
    """The same page as its own successor: equal tokens, path and key, another parent."""
    allocator, cache = cache_for(digest=one_key)
    pages = put(allocator, cache, LONG[:3])
    assert cache.match(NAMESPACE, LONG[:3] * 2, ["decode"] * 2) == pages
    mine = [*pages, *allocator.allocate(1)]
    cache.insert(NAMESPACE, LONG[:3] * 2, ["decode"] * 2, mine)
    assert len(cache) == 1 and mine == [0, 1]


# Giving up


def test_the_most_recently_used_prefix_is_evicted_last() -> None:
    allocator, cache = cache_for(6)
    old, new = [1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 9]
    allocator.release(put(allocator, cache, old))
    allocator.release(put(allocator, cache, [9, 9, 9]))
    assert len(found(allocator, cache, old)) == 2
    pages = put(allocator, cache, new)
    allocator.release(pages)
    assert allocator.num_free == 2
    held = allocator.allocate(3)
    assert found(allocator, cache, [9, 9, 9]) == []
    held += allocator.allocate(1)
    assert len(found(allocator, cache, old)) == 1 and len(found(allocator, cache, new)) == 2
    cache.check_integrity([held])


def test_clear_frees_cached_pages_and_leaves_those_in_use() -> None:
    allocator, cache = cache_for()
    allocator.release(put(allocator, cache, LONG))
    held = cache.match(NAMESPACE, LONG, paths(LONG[:6]))
    cache.clear()
    assert (allocator.num_free, allocator.num_cached, allocator.num_used) == (6, 0, 2)
    assert found(allocator, cache, LONG) == held
    cache.check_integrity([held])


# The contract


def test_withdrawn_pages_leave_the_index_with_all_that_follow() -> None:
    """A cached page is free at once, a used one when its holder releases it."""
    allocator, cache = cache_for(12)
    ended = put(allocator, cache, LONG)
    going = cache.match(NAMESPACE, LONG, ["decode"] * 2)
    going += allocator.allocate(1)
    branch = [*LONG[:6], 7, 7, 7]
    cache.insert(NAMESPACE, branch, ["decode"] * 3, going)
    other = put(allocator, cache, [1, 2, 3])
    allocator.release(ended)
    cache.withdraw([ended[1], 11])
    cache.check_integrity([going, other])
    assert found(allocator, cache, LONG) == found(allocator, cache, branch) == ended[:1]
    assert found(allocator, cache, [1, 2, 3]) == other
    assert (allocator.num_used, allocator.num_cached, cache.evictions) == (4, 0, 4)
    # Who computed on them and got on makes them known again.
    cache.insert(NAMESPACE, branch, ["decode"] * 3, going)
    assert found(allocator, cache, branch) == going
    cache.check_integrity([going, other])


def test_breaking_the_contract_is_noticed() -> None:
    allocator, cache = cache_for()
    pages = put(allocator, cache, LONG)
    for broken in (
        lambda: PrefixCache(allocator, page_size=3),
        lambda: PrefixCache(PageAllocator(1), page_size=0),
        lambda: cache.match(NAMESPACE, LONG[:5], ["decode"] * 2),
        lambda: cache.insert(NAMESPACE, LONG, paths(LONG), pages[:3]),
        lambda: cache.insert(b"other", LONG, paths(LONG), pages),
        lambda: cache.insert(NAMESPACE, [*LONG[:-1], 7], paths(LONG), pages),
        lambda: cache.insert(NAMESPACE, LONG[3:], paths(LONG[3:]), pages[1:]),
    ):
        with pytest.raises(AssertionError):
            broken()
        cache.check_integrity([pages])


def test_check_integrity_finds_a_page_whose_parent_was_released() -> None:
    allocator, cache = cache_for()
    pages = put(allocator, cache, LONG)
    allocator.release(pages[:1])
    with pytest.raises(AssertionError, match="parent let go"):
        cache.check_integrity([pages[1:]])


def test_check_integrity_finds_pages_released_in_the_wrong_order() -> None:
    allocator, cache = cache_for()
    pages = put(allocator, cache, LONG)
    allocator.release(pages[:2])
    allocator.release(pages[2:])
    with pytest.raises(AssertionError, match="outlive its parent"):
        cache.check_integrity([])


def test_check_integrity_finds_a_marked_page_without_index_entry() -> None:
    allocator, cache = cache_for()
    pages = allocator.allocate(1)
    allocator.keep(pages[0])
    with pytest.raises(AssertionError, match="index and the kept pages"):
        cache.check_integrity([pages])


# Against the plain model


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_sequences_agree_with_the_model(seed: int) -> None:
    """`benchmarks/page_allocator.py` makes 100,000 steps of each."""
    driver = Driver(seed)
    driver.run(5_000, check_every=25)
    done = driver.done
    assert min(done[name] for name in ("hit pages", "evictions", "adoptions", "preemptions")) > 20


@pytest.mark.parametrize("seed", range(20))
def test_random_sequences_get_their_own_entries_despite_collisions(seed: int) -> None:
    driver = Driver(seed, digest=low_bits)
    driver.run(1_000, check_every=10)
    assert driver.done["hit pages"] > 20
