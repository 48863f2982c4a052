"""The page allocator against a plain model of it, and the contract it asserts."""

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lowlat.engine.page_allocator import PageAllocator


class PoolMachine(RuleBasedStateMachine):
    """Sequences that take, share and give back pages in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(7)
        self.holders: list[list[int]] = []

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.allocator.num_free))
        in_use = {page for holder in self.holders for page in holder}
        lowest = sorted(set(range(self.allocator.num_pages)) - in_use)[:count]
        pages = self.allocator.allocate(count)
        assert pages == lowest
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        shared = holder[: data.draw(st.integers(0, len(holder)))]
        self.allocator.retain(shared)
        self.holders.append(list(shared))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.allocator.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: self.allocator.num_pages < 40)
    @rule(extra=st.integers(0, 5))
    def grow(self, extra: int) -> None:
        self.allocator.grow(self.allocator.num_pages + extra)

    @invariant()
    def accounts_agree(self) -> None:
        self.allocator.check_integrity(self.holders)
        held = [page for holder in self.holders for page in holder]
        assert self.allocator.num_used == len(set(held))
        assert self.allocator.num_used + self.allocator.num_free == self.allocator.num_pages
        for page in set(held):
            assert self.allocator.is_shared(page) == (held.count(page) > 1)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=50, deadline=None)


def test_a_lone_sequence_always_gets_consecutive_pages() -> None:
    """Regression: pages handed out last released first, whose entries must be gathered for
    reading."""
    allocator = PageAllocator(8)
    for _ in range(3):
        first, second = allocator.allocate(2), allocator.allocate(3)
        assert first + second == [0, 1, 2, 3, 4]
        allocator.release(second)
        allocator.release(first)


def test_breaking_the_contract_is_noticed_and_changes_nothing() -> None:
    allocator = PageAllocator(3)
    held = allocator.allocate(2)
    for broken in (
        lambda: allocator.allocate(2),
        lambda: allocator.release([held[0], 2]),
        lambda: allocator.release([held[0], held[0]]),
        lambda: allocator.retain([held[0], 2]),
        lambda: allocator.grow(2),
    ):
        with pytest.raises(AssertionError):
            broken()
        allocator.check_integrity([held])


def test_marked_pages_are_cached_until_evicted() -> None:
    """Free pages go first, then the least recently released, deeper pages before earlier ones."""
    allocator = PageAllocator(6)
    evicted: list[int] = []
    allocator.listen(evicted.append)
    first, second = allocator.allocate(2), allocator.allocate(2)
    for page in [*first, *second]:
        allocator.keep(page)
    allocator.release(second)
    allocator.release(first)
    assert (
        allocator.num_free,
        allocator.num_cached,
        allocator.num_available,
        allocator.num_used,
    ) == (2, 4, 6, 0)
    assert allocator.eviction_order() == [3, 2, 1, 0]
    assert allocator.allocate(3) == [4, 5, 3] and evicted == [3]
    allocator.retain([2])
    assert allocator.allocate(2) == [0, 1] and evicted == [3, 1, 0]
    allocator.check_integrity([[4, 5, 3], [2], [0, 1]])
    allocator.release([2])
    allocator.release([3])
    assert (allocator.num_free, allocator.num_cached) == (1, 1)
    assert allocator.is_free(3) and allocator.is_kept(2) and not allocator.is_free(2)


def test_evict_all_leaves_pages_in_use_alone() -> None:
    allocator = PageAllocator(4)
    held = allocator.allocate(3)
    allocator.keep(0)
    allocator.keep(1)
    allocator.release([1])
    allocator.evict_all()
    assert (
        allocator.num_free,
        allocator.num_cached,
        allocator.is_kept(0),
        allocator.is_kept(1),
    ) == (2, 0, True, False)
    allocator.check_integrity([[0], [held[2]]])


def test_breaking_the_contract_of_marked_pages_is_noticed() -> None:
    allocator = PageAllocator(3)
    held = allocator.allocate(2)
    allocator.keep(1)
    allocator.listen(lambda page: None)
    for broken in (
        lambda: allocator.keep(1),
        lambda: allocator.keep(2),
        lambda: allocator.listen(lambda page: None),
        lambda: PageAllocator(-1),
    ):
        with pytest.raises(AssertionError):
            broken()
        allocator.check_integrity([held])
    allocator.release([1])
    with pytest.raises(AssertionError, match="page 1 has no holder"):
        allocator.release([1])
    with pytest.raises(AssertionError, match="3 pages wanted, 2 available"):
        allocator.allocate(3)
    allocator.check_integrity([[0]])


def test_assertions_hold_under_python_o() -> None:
    """Regression: checks that vanish with `assert` where users run `python -O`."""
    code = (
        "from lowlat.engine.page_allocator import PageAllocator\n"
        "allocator = PageAllocator(1)\n"
        "release = lambda: allocator.release([0])\n"
        "for broken in (release, lambda: allocator.check_integrity([[0]])):\n"
        "    try:\n"
        "        broken()\n"
        "    except AssertionError:\n"
        "        print('noticed')\n"
    )
    run = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["noticed", "noticed"], run.stderr


def test_check_integrity_finds_a_leak_and_a_double_hold() -> None:
    allocator = PageAllocator(3)
    held = allocator.allocate(2)
    allocator.check_integrity()
    for wrong in ([], [held, held], [[*held, 2]]):
        with pytest.raises(AssertionError, match="holders"):
            allocator.check_integrity(wrong)
