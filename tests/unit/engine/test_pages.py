"""The page pool against a plain model of it, and the contract it asserts."""

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


def test_check_integrity_finds_a_leak_and_a_double_hold() -> None:
    pool = PagePool(3)
    held = pool.allocate(2)
    pool.check_integrity()
    for wrong in ([], [held, held], [[*held, 2]]):
        with pytest.raises(AssertionError, match="holders"):
            pool.check_integrity(wrong)
