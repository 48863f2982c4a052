"""The scheduler alone: which sequences run, in which order, on which pages. No tensors."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.prefill_planner import PrefillPlanner
from lowlat.engine.prefix import PrefixCache
from lowlat.engine.request import Request, RequestOptions, Sequence
from lowlat.engine.scheduler import Limits, Scheduler
from tests.fakes import gqa_config

PAGE = 4


def scheduler_for(
    *,
    pages: int = 1000,
    chunk: int = 100,
    has_prefix_cache: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    **limits: Any,
) -> Scheduler:
    allocator = PageAllocator(pages)
    limits.setdefault("lone_tokens", limits.get("step_tokens", 1024))
    return Scheduler(
        planner=PrefillPlanner(gqa_config().attention, chunk=chunk, page_size=PAGE),
        allocator=allocator,
        prefix=PrefixCache(allocator, page_size=PAGE) if has_prefix_cache else None,
        limits=Limits(max_pages=pages, **limits),
        clock=clock,
    )


def sequence(length: int, n: int = 1, first: int = 0, **options: Any) -> Sequence:
    """The prompt first, first + 1, ...; sequences arrive in the order of creation."""
    params = TokenSamplingParams(n=n, temperature=1.0)
    sequence.made += 1
    request = Request(
        id=sequence.made,
        prompt=tuple(range(first, first + length)),
        params=params,
        options=RequestOptions(**options),
        max_outputs=99,
        arrived_at=float(sequence.made),
    )
    return Sequence(
        request=request,
        index=0,
        tokens=list(request.prompt),
    )


sequence.made = 0


def step(scheduler: Scheduler) -> dict[Sequence, int]:
    """Run one step as the engine does; the length of each sequence's work."""
    work = scheduler.schedule()
    for item in work:
        known = len(item.sequence.tokens) - item.sequence.num_cached
        assert len(item.sequence.pages) * PAGE >= item.start + item.length
        scheduler.kv_cache.advance(item.sequence, min(item.length, known))
        if item.sequence.num_pending == 0:
            item.sequence.tokens.append(1)
    holders = [s.pages for s in [*scheduler.running, *scheduler.waiting]]
    if scheduler.kv_cache.prefix is not None:
        scheduler.kv_cache.prefix.check_integrity(holders)
    scheduler.kv_cache.allocator.check_integrity(holders)
    return {item.sequence: item.length for item in work}


# The budget of a step


def test_decoding_continues_during_a_prefill() -> None:
    """Regression: all requests waiting for a long prompt."""
    scheduler = scheduler_for(step_tokens=50, mixed_tokens=8)
    short, long = sequence(3), sequence(60, first=500)
    scheduler.add(short)
    assert step(scheduler) == {short: 3}
    scheduler.add(long)
    for start in range(0, 56, 8):
        assert step(scheduler) == {short: 1, long: 8}, start
    assert step(scheduler) == {short: 1, long: 4}
    assert step(scheduler) == {short: 1, long: 1}


def test_a_lone_prompt_prefills_in_longer_steps() -> None:
    scheduler = scheduler_for(step_tokens=20, lone_tokens=50, has_prefix_cache=False)
    long = sequence(90)
    scheduler.add(long)
    assert step(scheduler) == {long: 50}
    scheduler.add(sequence(30, first=100))
    assert sum(step(scheduler).values()) == 20


def test_the_prefill_budget_grows_with_prefilling_sequences_per_decoding_one() -> None:
    """Regression: many prompts that arrive at once, delayed by the first ones to decode."""
    scheduler = scheduler_for(step_tokens=20, mixed_tokens=8, has_prefix_cache=False)
    short = sequence(3)
    scheduler.add(short)
    assert step(scheduler) == {short: 3}
    prompts = [sequence(length, first=100 * length) for length in (30, 31, 32)]
    for prompt in prompts[:2]:
        scheduler.add(prompt)
    assert sum(step(scheduler).values()) == 1 + 2 * 8
    scheduler.add(prompts[2])
    assert sum(step(scheduler).values()) == 1 + 20
    scheduler.remove(short)
    while any(prompt.is_prefilling for prompt in prompts):
        step(scheduler)
    late = sequence(40, first=900)
    scheduler.add(late)
    assert step(scheduler) == {**dict.fromkeys(prompts, 1), late: 8}


def test_offline_decoding_does_not_shrink_prefill_chunks() -> None:
    scheduler = scheduler_for(step_tokens=20, mixed_tokens=4, has_prefix_cache=False)
    patient, hasty = sequence(3, is_offline=True), sequence(3, first=50)
    long = sequence(90, first=100)
    scheduler.add(patient)
    step(scheduler)
    scheduler.add(long)
    assert step(scheduler) == {patient: 1, long: 20}
    scheduler.add(hasty)
    assert step(scheduler) == {patient: 1, hasty: 3, long: 17}
    assert step(scheduler) == {patient: 1, hasty: 1, long: 4}


def test_half_of_the_budget_is_the_oldest_prompts_and_the_rest_the_shortest_ones() -> None:
    """Regression: short prompts waiting behind a long one, and a long one starving."""
    scheduler = scheduler_for(step_tokens=20)
    oldest, long, short = sequence(80), sequence(70, first=100), sequence(6, first=200)
    for item in (oldest, long, short):
        scheduler.add(item)
    assert step(scheduler) == {oldest: 10, short: 6, long: 4}


def test_what_others_leave_of_the_budget_is_used() -> None:
    scheduler = scheduler_for(step_tokens=20)
    oldest, short = sequence(80), sequence(3, first=200)
    scheduler.add(oldest)
    scheduler.add(short)
    assert step(scheduler) == {oldest: 17, short: 3}


def test_a_prefill_chunk_ends_with_its_grid_chunk() -> None:
    """Regression: entries of two paths in one chunk."""
    scheduler = scheduler_for(step_tokens=30, chunk=16)
    one = sequence(40)
    scheduler.add(one)
    assert [step(scheduler)[one] for _ in range(4)] == [16, 16, 8, 1]


# Who comes first


def test_a_request_waits_until_all_its_completions_fit() -> None:
    scheduler = scheduler_for(max_sequences=4)
    first, wide, last = sequence(2), sequence(3, n=4, first=50), sequence(4, first=90)
    for item in (first, wide, last):
        scheduler.add(item)
    assert step(scheduler) == {first: 2}
    assert step(scheduler) == {first: 1}
    scheduler.remove(first)
    # `last` would have had room before; who waits is not overtaken.
    assert step(scheduler) == {wide: 3}
    scheduler.remove(wide)
    assert step(scheduler) == {last: 4}
    scheduler.remove(last)
    assert not scheduler.has_work and scheduler.schedule() == []


def test_lower_priority_values_are_admitted_first() -> None:
    scheduler = scheduler_for(max_sequences=1)
    late, early = sequence(2, priority=5), sequence(3, first=50, priority=-1)
    scheduler.add(late)
    scheduler.add(early)
    assert step(scheduler) == {early: 3}


def test_a_low_priority_request_is_overtaken_for_a_bounded_time() -> None:
    """Regression: a request of low priority that starves while others arrive."""
    now = 0.0
    scheduler = scheduler_for(max_sequences=1, clock=lambda: now)
    late = sequence(2, priority=3, cache_namespace=b"late")
    scheduler.add(late)
    served = []
    for turn in range(1, 6):
        scheduler.add(sequence(3, first=50 * turn))
        now = late.request.arrived_at + turn
        served.append(next(iter(step(scheduler))))
        scheduler.remove(served[-1])
    assert served.index(late) == 2


def test_a_negative_priority_overtakes_its_own_namespace_only() -> None:
    """Regression: a client that is served before all others by setting its priority."""
    scheduler = scheduler_for(max_sequences=1)
    modest = [sequence(4, first=100 * i, cache_namespace=b"modest") for i in range(1, 4)]
    urgent = [
        sequence(4, first=100 * i, cache_namespace=b"urgent", priority=-100) for i in range(4, 7)
    ]
    plain = sequence(4, first=700, cache_namespace=b"urgent")
    for item in [*modest, plain, *urgent]:
        scheduler.add(item)
    served = []
    while scheduler.has_work:
        served.append(next(iter(step(scheduler))))
        scheduler.remove(served[-1])
    assert [served.index(item) for item in urgent] == [0, 2, 4]
    assert [served.index(item) for item in modest] == [1, 3, 5]
    assert served[-1] is plain


def test_a_negative_priority_preempts_no_running_sequence() -> None:
    scheduler = scheduler_for(pages=7, has_prefix_cache=False)
    first, second = (
        sequence(8, cache_namespace=b"a"),
        sequence(8, first=50, cache_namespace=b"b", priority=-100),
    )
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(6):
        step(scheduler)
    assert scheduler.waiting == [second] and scheduler.running == [first]


def test_a_client_with_many_requests_does_not_delay_another() -> None:
    """Regression: first come, first served over clients of unequal load."""
    scheduler = scheduler_for(max_sequences=1)
    greedy = [sequence(9, first=100 * i, cache_namespace=b"greedy") for i in range(1, 6)]
    for item in greedy:
        scheduler.add(item)
    assert step(scheduler) == {greedy[0]: 9}
    modest = sequence(4, first=900, cache_namespace=b"modest")
    scheduler.add(modest)
    scheduler.remove(greedy[0])
    # Who comes starts level, so that one of the others may still be first, but one only.
    assert step(scheduler) == {greedy[1]: 9}
    scheduler.remove(greedy[1])
    assert step(scheduler) == {modest: 4}
    scheduler.remove(modest)
    assert step(scheduler) == {greedy[2]: 9}


def test_a_waiting_sequence_can_be_removed() -> None:
    scheduler = scheduler_for(max_sequences=1)
    first, second = sequence(2), sequence(3, first=50)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.remove(second)
    assert scheduler.waiting == [] and scheduler.running == [first]


# Pages


def test_the_last_sequence_in_order_is_preempted_and_recomputed() -> None:
    """Two sequences of 8 tokens each, 7 pages: both fit, until they grow to 4 each."""
    scheduler = scheduler_for(pages=7, has_prefix_cache=False)
    first, second = sequence(8), sequence(8, first=50)
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler) == {first: 8, second: 8}
    for _ in range(4):
        assert step(scheduler) == {first: 1, second: 1}
    assert step(scheduler) == {first: 1}
    assert scheduler.num_preemptions == 1 and scheduler.waiting == [second]
    assert second.pages == [] and second.num_cached == 0 and second.num_outputs == 5
    scheduler.remove(first)
    assert step(scheduler) == {second: 8}, "its prompt is read in the path it had"
    assert step(scheduler) == {second: 5}, "what it generated is read as a stream"
    assert step(scheduler) == {second: 1}


def test_a_preempted_sequence_hits_the_prefix_cache() -> None:
    scheduler = scheduler_for(pages=7)
    first, second = sequence(8), sequence(8, first=50)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(6):
        step(scheduler)
    assert scheduler.waiting == [second]
    scheduler.remove(first)
    # Of 13 tokens, prompt and output, three pages are still there.
    assert step(scheduler) == {second: 1}


def test_a_request_without_free_pages_waits_and_holds_none() -> None:
    scheduler = scheduler_for(pages=5)
    first, second = sequence(13), sequence(9, first=50)
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler) == {first: 13}
    assert second.pages == [] and scheduler.num_preemptions == 0
    scheduler.remove(first)
    assert step(scheduler) == {second: 9}


def test_drafts_are_dropped_rather_than_a_sequence_preempted() -> None:
    scheduler = scheduler_for(pages=3)
    one = sequence(8)
    scheduler.add(one)
    step(scheduler)
    one.draft_tokens = [1, 2, 3]
    assert step(scheduler) == {one: 4}, "there is a page for them"
    one.tokens += [1, 2, 3][: 12 - len(one.tokens)]
    scheduler.kv_cache.advance(one, len(one.tokens) - 1 - one.num_cached)
    one.draft_tokens = [7, 8, 9]
    assert step(scheduler) == {one: 1} and one.draft_tokens == []


# A prompt that many share


@pytest.mark.parametrize("at_once", [True, False])
def test_a_shared_prefix_is_prefilled_once(at_once: bool) -> None:
    """Regression: sixteen requests with one system prompt prefilling it sixteen times."""
    scheduler = scheduler_for(step_tokens=16)
    prompts = [sequence(40) for _ in range(4)]
    for number, item in enumerate(prompts):
        item.tokens += [300 + number]
        item.request.prompt = tuple(item.tokens)
    total = 0
    for item in prompts if at_once else prompts[:1]:
        scheduler.add(item)
    for turn in range(12):
        if turn == 6 and not at_once:
            for item in prompts[1:]:
                scheduler.add(item)
        total += sum(length for item, length in step(scheduler).items() if item.num_outputs <= 1)
    assert all(item.num_outputs > 0 for item in prompts)
    assert total <= 41 + 3 + 12
    assert [item.request.num_matched for item in prompts[1:]] == [40, 40, 40]


def test_entries_of_another_client_are_not_found() -> None:
    scheduler = scheduler_for()
    mine, yours = sequence(40, cache_namespace=b"mine"), sequence(40, cache_namespace=b"yours")
    scheduler.add(mine)
    step(scheduler)
    scheduler.add(yours)
    assert step(scheduler)[yours] == 40 and yours.request.num_matched == 0


def test_the_last_token_is_always_computed() -> None:
    """Its logits are needed: a prompt of full pages never hits completely."""
    scheduler = scheduler_for()
    for expected in (8, 4):
        item = sequence(8)
        scheduler.add(item)
        assert step(scheduler) == {item: expected}
        scheduler.remove(item)
