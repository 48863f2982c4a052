"""The prefix cache: what is found, what is never found, and who gives up pages first."""

import hashlib
from collections.abc import Sequence

import pytest

from lowlat.engine.pages import PagePool
from lowlat.engine.prefix import Digest, PrefixCache
from tests.page_driver import Driver

SALT = b"key"
LONG = list(range(100, 112))
"""Four pages of three tokens."""


def cache_for(num_pages: int = 8, digest: Digest | None = None) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(num_pages)
    return pool, PrefixCache(pool, page_size=3, digest=digest)


def forms(tokens: Sequence[int], form: str = "stream") -> list[str]:
    return [form] * (len(tokens) // 3)


def put(pool: PagePool, cache: PrefixCache, tokens: Sequence[int], salt: bytes = SALT) -> list[int]:
    """Pages of a running sequence whose whole pages are known."""
    pages = pool.allocate(-(-len(tokens) // 3))
    cache.insert(salt, tokens, forms(tokens), pages)
    return pages


def found(
    pool: PagePool, cache: PrefixCache, tokens: Sequence[int], salt: bytes = SALT, **form: str
) -> list[int]:
    pages = cache.match(salt, tokens, forms(tokens, **form))
    pool.release(pages)
    return pages


def one_key(data: bytes) -> bytes:
    """Every page's key is the same."""
    return b"same"


def low_bits(data: bytes) -> bytes:
    """Keys that collide often."""
    return bytes([hashlib.sha256(data).digest()[0] & 15])


# What is found


def test_the_longest_known_beginning_is_found_and_held() -> None:
    pool, cache = cache_for()
    pages = put(pool, cache, LONG)
    pool.release(pages)
    assert (pool.num_cached, pool.num_used) == (4, 0)
    matched = cache.match(SALT, [*LONG[:8], 7, 7, 7], ["stream"] * 3)
    assert matched == pages[:2]
    assert (pool.num_cached, pool.num_used) == (2, 2)
    assert pool.allocate(6) == [4, 5, 6, 7, *pages[2:]]
    cache.check_integrity([matched, [4, 5, 6, 7, *pages[2:]]])


def test_pages_in_use_are_shared() -> None:
    pool, cache = cache_for()
    pages = put(pool, cache, LONG)
    assert cache.match(SALT, LONG, forms(LONG)) == pages
    assert all(pool.is_shared(page) for page in pages)
    cache.check_integrity([pages, pages])


def test_only_as_many_pages_as_forms_are_looked_for() -> None:
    """Holds shut: a prompt found whole, which leaves no token to take logits from."""
    pool, cache = cache_for()
    pages = put(pool, cache, LONG)
    assert cache.match(SALT, LONG, forms(LONG[:-1])) == pages[:3]


def test_a_partly_filled_page_is_not_known() -> None:
    pool, cache = cache_for()
    pool.release(put(pool, cache, LONG[:5]))
    assert (pool.num_cached, pool.num_free, len(cache)) == (1, 7, 1)


def test_a_growing_sequence_makes_page_after_page_known() -> None:
    pool, cache = cache_for()
    pages: list[int] = []
    for length in range(1, len(LONG) + 1):
        if length % 3 == 1:
            pages += pool.allocate(1)
        cache.insert(SALT, LONG[:length], forms(LONG[:length]), pages)
        assert len(cache) == length // 3
    assert found(pool, cache, LONG) == pages


def test_a_growing_sequence_costs_only_its_new_pages() -> None:
    """Holds shut: the whole prompt hashed again for each page that decoding fills."""
    calls: list[bytes] = []

    def counting(data: bytes) -> bytes:
        calls.append(data)
        return hashlib.sha256(data).digest()

    pool, cache = cache_for(200, counting)
    tokens = list(range(300))
    pages = pool.allocate(101)
    cache.insert(SALT, tokens, forms(tokens), pages)
    calls.clear()
    cache.insert(SALT, tokens, forms(tokens), pages)
    assert len(calls) == 0
    tokens += [1, 2, 3]
    cache.insert(SALT, tokens, forms(tokens), pages)
    assert len(calls) == 1 and len(cache) == 101


def test_counters_are_in_tokens_and_pages() -> None:
    pool, cache = cache_for(4)
    pool.release(put(pool, cache, LONG))
    found(pool, cache, LONG[:7])
    found(pool, cache, [1, 2, 3, 4])
    assert (cache.queried_tokens, cache.hit_tokens, cache.evictions) == (11, 6, 0)
    pool.release(pool.allocate(3))
    assert cache.evictions == 3
    cache.clear()
    assert cache.evictions == 4 and len(cache) == 0


# Pages of equal rows


def test_a_page_of_rows_that_are_known_is_given_back_for_the_known_one() -> None:
    """Two sequences computed the same beginning side by side: one copy stays."""
    pool, cache = cache_for(10)
    first, second = pool.allocate(4), pool.allocate(4)
    cache.insert(SALT, LONG, forms(LONG), first)
    other = [*LONG[:6], 1, 2, 3, 4]
    cache.insert(SALT, other, forms(other), second)
    assert second[:2] == first[:2] and second[2:] == [6, 7]
    assert pool.num_used == 6
    cache.check_integrity([first, second])
    # What follows the shared pages is known too, and outlived by them.
    pool.release(first)
    cache.check_integrity([second])
    pool.release(second)
    assert found(pool, cache, other) == second[:3]
    assert found(pool, cache, LONG) == first


def test_pages_that_were_shared_before_they_were_known_stay_unknown() -> None:
    """Holds shut: a page known as the successor of one that its other holder does not hold, which
    could be evicted first."""
    pool, cache = cache_for()
    known = put(pool, cache, LONG[:3])
    pages = pool.allocate(2)
    sibling = list(pages)
    pool.retain(sibling)
    cache.insert(SALT, LONG[:6], forms(LONG[:6]), pages)
    assert pages == sibling and len(cache) == 1
    pool.release(pages)
    cache.insert(SALT, LONG[:6], forms(LONG[:6]), sibling)
    assert sibling[0] == known[0] and len(cache) == 2
    cache.check_integrity([known, sibling])


# What is never found


def test_salts_share_nothing() -> None:
    pool, cache = cache_for()
    put(pool, cache, LONG, salt=b"mine")
    assert found(pool, cache, LONG, salt=b"yours") == []
    assert found(pool, cache, LONG, salt=b"") == []
    other = put(pool, cache, LONG, salt=b"yours")
    assert set(other) == {4, 5, 6, 7}


def test_rows_of_another_form_are_not_found() -> None:
    pool, cache = cache_for()
    pages = put(pool, cache, LONG)
    assert found(pool, cache, LONG, form="expanded") == []
    assert cache.match(SALT, LONG, ["stream", "stream", "expanded", "stream"]) == pages[:2]


def test_the_end_of_a_form_is_not_the_beginning_of_the_tokens() -> None:
    """Holds shut: equal keys of different (form, tokens), the form being of any length."""
    seen: list[bytes] = []

    def recording(data: bytes) -> bytes:
        seen.append(data)
        return hashlib.sha256(data).digest()

    _, cache = cache_for(digest=recording)
    a = int.from_bytes(b"aaaa", "little")
    cache.match(SALT, [a, a, a], ["f"])
    cache.match(SALT, [a, a, a], ["faaaa"])
    assert len({data[: len(seen[1])] for data in seen if len(data) > len(SALT)}) == 2


def test_equal_tokens_after_other_tokens_are_not_found() -> None:
    pool, cache = cache_for()
    put(pool, cache, LONG)
    assert found(pool, cache, LONG[3:]) == []
    assert found(pool, cache, [0, *LONG[1:]]) == []


@pytest.mark.parametrize(
    ("salt", "tokens", "form"),
    [
        (SALT, [9, *LONG[1:]], "stream"),
        (SALT, [*LONG[:2], 9], "stream"),
        (SALT, LONG[:3], "expanded"),
        (b"other", LONG[:3], "stream"),
    ],
)
def test_equal_keys_do_not_show_other_rows(salt: bytes, tokens: list[int], form: str) -> None:
    """Holds shut: trust in the hash. Here all keys are equal, and only what is compared differs."""
    pool, cache = cache_for(digest=one_key)
    pages = put(pool, cache, LONG[:3])
    assert found(pool, cache, LONG[:3]) == pages
    assert found(pool, cache, tokens, salt, form=form) == []
    mine = pool.allocate(1)
    cache.insert(salt, tokens[:3], [form], mine)
    assert mine == [1] and found(pool, cache, LONG[:3]) == pages
    cache.check_integrity([pages, mine])


def test_equal_keys_do_not_show_another_parent() -> None:
    """The same page as its own successor: equal tokens, form and key, another parent."""
    pool, cache = cache_for(digest=one_key)
    pages = put(pool, cache, LONG[:3])
    assert cache.match(SALT, LONG[:3] * 2, ["stream"] * 2) == pages
    mine = [*pages, *pool.allocate(1)]
    cache.insert(SALT, LONG[:3] * 2, ["stream"] * 2, mine)
    assert len(cache) == 1 and mine == [0, 1]


# Giving up


def test_the_beginning_used_last_stays_longest() -> None:
    pool, cache = cache_for(6)
    old, new = [1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 9]
    pool.release(put(pool, cache, old))
    pool.release(put(pool, cache, [9, 9, 9]))
    assert len(found(pool, cache, old)) == 2
    pages = put(pool, cache, new)
    pool.release(pages)
    assert pool.num_free == 2
    held = pool.allocate(3)
    assert found(pool, cache, [9, 9, 9]) == []
    held += pool.allocate(1)
    assert len(found(pool, cache, old)) == 1 and len(found(pool, cache, new)) == 2
    cache.check_integrity([held])


def test_clear_frees_cached_pages_and_leaves_those_in_use() -> None:
    pool, cache = cache_for()
    pool.release(put(pool, cache, LONG))
    held = cache.match(SALT, LONG, forms(LONG[:6]))
    cache.clear()
    assert (pool.num_free, pool.num_cached, pool.num_used) == (6, 0, 2)
    assert found(pool, cache, LONG) == held
    cache.check_integrity([held])


# The contract


def test_what_is_withdrawn_is_forgotten_with_all_that_follows_it() -> None:
    """Held or not: a cached page is free at once, a used one when its holder lets go."""
    pool, cache = cache_for(12)
    ended = put(pool, cache, LONG)
    going = cache.match(SALT, LONG, ["stream"] * 2)
    going += pool.allocate(1)
    branch = [*LONG[:6], 7, 7, 7]
    cache.insert(SALT, branch, ["stream"] * 3, going)
    other = put(pool, cache, [1, 2, 3])
    pool.release(ended)
    cache.withdraw([ended[1], 11])
    cache.check_integrity([going, other])
    assert found(pool, cache, LONG) == found(pool, cache, branch) == ended[:1]
    assert found(pool, cache, [1, 2, 3]) == other
    assert (pool.num_used, pool.num_cached, cache.evictions) == (4, 0, 4)
    # Who computed on them and got on makes them known again.
    cache.insert(SALT, branch, ["stream"] * 3, going)
    assert found(pool, cache, branch) == going
    cache.check_integrity([going, other])


def test_breaking_the_contract_is_noticed() -> None:
    pool, cache = cache_for()
    pages = put(pool, cache, LONG)
    for broken in (
        lambda: PrefixCache(pool, page_size=3),
        lambda: PrefixCache(PagePool(1), page_size=0),
        lambda: cache.match(SALT, LONG[:5], ["stream"] * 2),
        lambda: cache.insert(SALT, LONG, forms(LONG), pages[:3]),
        lambda: cache.insert(b"other", LONG, forms(LONG), pages),
        lambda: cache.insert(SALT, [*LONG[:-1], 7], forms(LONG), pages),
        lambda: cache.insert(SALT, LONG[3:], forms(LONG[3:]), pages[1:]),
    ):
        with pytest.raises(AssertionError):
            broken()
        cache.check_integrity([pages])


def test_check_integrity_finds_a_page_whose_beginning_was_let_go() -> None:
    pool, cache = cache_for()
    pages = put(pool, cache, LONG)
    pool.release(pages[:1])
    with pytest.raises(AssertionError, match="parent let go"):
        cache.check_integrity([pages[1:]])


def test_check_integrity_finds_pages_released_in_the_wrong_order() -> None:
    pool, cache = cache_for()
    pages = put(pool, cache, LONG)
    pool.release(pages[:2])
    pool.release(pages[2:])
    with pytest.raises(AssertionError, match="outlive its parent"):
        cache.check_integrity([])


def test_check_integrity_finds_a_kept_page_without_entry() -> None:
    pool, cache = cache_for()
    pages = pool.allocate(1)
    pool.keep(pages[0])
    with pytest.raises(AssertionError, match="index and the kept pages"):
        cache.check_integrity([pages])


# Against the plain model


@pytest.mark.parametrize("seed", range(20))
def test_random_sequences_agree_with_the_model(seed: int) -> None:
    """`benchmarks/page_pool.py` makes 100,000 steps of each."""
    driver = Driver(seed)
    driver.run(5_000, check_every=25)
    done = driver.done
    assert min(done[name] for name in ("hit pages", "evictions", "adoptions", "preemptions")) > 20


@pytest.mark.parametrize("seed", range(20))
def test_random_sequences_get_their_own_rows_whatever_collides(seed: int) -> None:
    driver = Driver(seed, digest=low_bits)
    driver.run(1_000, check_every=10)
    assert driver.done["hit pages"] > 20
