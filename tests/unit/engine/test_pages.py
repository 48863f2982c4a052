"""The page pool against a plain model of it, and the contract it asserts."""

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lowlat.engine.pages import PagePool


class PoolMachine(RuleBasedStateMachine):
    """Sequences that take, share and give back pages in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(7)
        self.holders: list[list[int]] = []

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        in_use = {page for holder in self.holders for page in holder}
        lowest = sorted(set(range(self.pool.num_pages)) - in_use)[:count]
        pages = self.pool.allocate(count)
        assert pages == lowest
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        shared = holder[: data.draw(st.integers(0, len(holder)))]
        self.pool.retain(shared)
        self.holders.append(list(shared))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: self.pool.num_pages < 40)
    @rule(extra=st.integers(0, 5))
    def grow(self, extra: int) -> None:
        self.pool.grow(self.pool.num_pages + extra)

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check_integrity(self.holders)
        held = [page for holder in self.holders for page in holder]
        assert self.pool.num_used == len(set(held))
        assert self.pool.num_used + self.pool.num_free == self.pool.num_pages
        for page in set(held):
            assert self.pool.is_shared(page) == (held.count(page) > 1)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=50, deadline=None)


def test_a_lone_sequence_gets_consecutive_pages_again_and_again() -> None:
    """Holds shut: pages handed out last released first, whose rows must be copied to be read."""
    pool = PagePool(8)
    for _ in range(3):
        first, second = pool.allocate(2), pool.allocate(3)
        assert first + second == [0, 1, 2, 3, 4]
        pool.release(second)
        pool.release(first)


def test_breaking_the_contract_is_noticed_and_changes_nothing() -> None:
    pool = PagePool(3)
    held = pool.allocate(2)
    for broken in (
        lambda: pool.allocate(2),
        lambda: pool.release([held[0], 2]),
        lambda: pool.release([held[0], held[0]]),
        lambda: pool.retain([held[0], 2]),
        lambda: pool.grow(2),
    ):
        with pytest.raises(AssertionError):
            broken()
        pool.check_integrity([held])


def test_kept_pages_are_cached_until_they_are_wanted() -> None:
    """Free pages go first, then the page let go longest ago, deeper pages before earlier ones."""
    pool = PagePool(6)
    evicted: list[int] = []
    pool.listen(evicted.append)
    first, second = pool.allocate(2), pool.allocate(2)
    for page in [*first, *second]:
        pool.keep(page)
    pool.release(second)
    pool.release(first)
    assert (pool.num_free, pool.num_cached, pool.num_available, pool.num_used) == (2, 4, 6, 0)
    assert pool.eviction_order() == [3, 2, 1, 0]
    assert pool.allocate(3) == [4, 5, 3] and evicted == [3]
    pool.retain([2])
    assert pool.allocate(2) == [0, 1] and evicted == [3, 1, 0]
    pool.check_integrity([[4, 5, 3], [2], [0, 1]])
    pool.release([2])
    pool.release([3])
    assert (pool.num_free, pool.num_cached) == (1, 1)
    assert pool.is_free(3) and pool.is_kept(2) and not pool.is_free(2)


def test_evict_all_leaves_pages_in_use_alone() -> None:
    pool = PagePool(4)
    held = pool.allocate(3)
    pool.keep(0)
    pool.keep(1)
    pool.release([1])
    pool.evict_all()
    assert (pool.num_free, pool.num_cached, pool.is_kept(0), pool.is_kept(1)) == (2, 0, True, False)
    pool.check_integrity([[0], [held[2]]])


def test_breaking_the_contract_of_kept_pages_is_noticed() -> None:
    pool = PagePool(3)
    held = pool.allocate(2)
    pool.keep(1)
    pool.listen(lambda page: None)
    for broken in (
        lambda: pool.keep(1),
        lambda: pool.keep(2),
        lambda: pool.listen(lambda page: None),
        lambda: PagePool(-1),
    ):
        with pytest.raises(AssertionError):
            broken()
        pool.check_integrity([held])
    pool.release([1])
    with pytest.raises(AssertionError, match="nobody holds page 1"):
        pool.release([1])
    with pytest.raises(AssertionError, match="3 pages wanted, 2 available"):
        pool.allocate(3)
    pool.check_integrity([[0]])


def test_assertions_hold_under_python_o() -> None:
    """Holds shut: checks that vanish with `assert` where users run `python -O`."""
    code = (
        "from lowlat.engine.pages import PagePool\n"
        "pool = PagePool(1)\n"
        "for broken in (lambda: pool.release([0]), lambda: pool.check_integrity([[0]])):\n"
        "    try:\n"
        "        broken()\n"
        "    except AssertionError:\n"
        "        print('noticed')\n"
    )
    run = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["noticed", "noticed"], run.stderr


def test_check_integrity_finds_a_leak_and_a_double_hold() -> None:
    pool = PagePool(3)
    held = pool.allocate(2)
    pool.check_integrity()
    for wrong in ([], [held, held], [[*held, 2]]):
        with pytest.raises(AssertionError, match="holders"):
            pool.check_integrity(wrong)
