"""The scheduler alone: who runs, in which order, and within which limits. No tensors."""

from lowlat.engine.params import SamplingParams
from lowlat.engine.request import Request, Sequence
from lowlat.engine.sampler import SequenceSampler
from lowlat.engine.scheduler import Scheduler


def sequence(length: int, n: int = 1) -> Sequence:
    params = SamplingParams(n=n, temperature=1.0)
    request = Request(id=0, prompt=tuple(range(length)), params=params, max_outputs=9)
    return Sequence(
        request=request,
        index=0,
        tokens=list(request.prompt),
        sampler=SequenceSampler(params, (), 0, 11),
    )


def lengths(scheduler: Scheduler) -> list[int]:
    """Run one step as the engine does; the length of each piece of work."""
    work = scheduler.schedule()
    for item in work:
        item.sequence.num_cached += item.length
        if item.sequence.num_pending == 0:
            item.sequence.tokens.append(1)
    return [item.length for item in work]


def test_prompts_are_read_in_chunks_before_anyone_decodes() -> None:
    scheduler = Scheduler(prefill_chunk=5, max_sequences=9)
    for length in (3, 11, 2):
        scheduler.add(sequence(length))
    # Chunks of a prompt are whole: the second does not start with what the first left over.
    assert lengths(scheduler) == [3]
    assert lengths(scheduler) == [5]
    assert lengths(scheduler) == [5]
    assert lengths(scheduler) == [1, 2]
    assert lengths(scheduler) == [1, 1, 1]


def test_a_request_waits_until_all_its_completions_have_room() -> None:
    scheduler = Scheduler(prefill_chunk=100, max_sequences=4)
    first, wide, last = sequence(2), sequence(3, n=4), sequence(4)
    for item in (first, wide, last):
        scheduler.add(item)
    assert lengths(scheduler) == [2]
    assert lengths(scheduler) == [1]
    scheduler.remove(first)
    # First come, first served: `last` would fit beside nobody, so it waits behind `wide`.
    assert lengths(scheduler) == [3]
    scheduler.remove(wide)
    assert lengths(scheduler) == [4]
    scheduler.remove(last)
    assert not scheduler.has_work and scheduler.schedule() == []


def test_a_waiting_sequence_can_be_removed() -> None:
    scheduler = Scheduler(prefill_chunk=5, max_sequences=1)
    first, second = sequence(2), sequence(3)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.remove(second)
    assert list(scheduler.waiting) == [] and scheduler.running == [first]
