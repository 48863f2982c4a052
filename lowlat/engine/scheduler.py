"""Who runs in the next step, and on which pages: plain Python over request records, no tensors.

Owns the order of waiting and running sequences, the token budget of a step, and the pages that
sequences hold: taken from the allocator and the prefix cache, given back when a sequence ends or
has to make room. What the tokens are is the engine's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from lowlat.attention.path import AttentionPath
from lowlat.engine.fairness import Fairness
from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.prefill_planner import PREFILL_CHUNK, PrefillPlanner
from lowlat.engine.prefix import PrefixCache
from lowlat.engine.request import Sequence

STEP_TOKENS = 1024
"""Tokens of prompts read in a step while nobody decodes."""
MIXED_TOKENS = 256
"""Tokens of prompts read in a step beside decoding, which waits for them, while no more sequences
read than decode: about as long as a step of eight decoding sequences takes on a CPU."""
MAX_SEQUENCES = 128
PRIORITY_SECONDS = 1.0
"""Waiting so long outweighs one step of priority, so that nobody waits without end."""


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """One sequence's share of a step: `length` tokens from `start` on, drafts included."""

    sequence: Sequence
    start: int
    """Rows it has in the cache."""
    length: int
    path: AttentionPath


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of a step and of the cache."""

    step_tokens: int = STEP_TOKENS
    lone_tokens: int = PREFILL_CHUNK
    """Tokens of a prompt read in a step while there is no other sequence."""
    mixed_tokens: int = MIXED_TOKENS
    max_sequences: int = MAX_SEQUENCES
    """Completions that run at once."""
    max_pages: int | None = None
    """Pages the cache may grow to; None: without end."""


class Scheduler:
    """Every decoding sequence runs in every step; the rest of the budget reads prompts.

    The more sequences read for each that decodes, the larger the budget, up to a whole step: when
    many come at once, the few that are ahead do not keep the others from their first token. It is
    a whole step where all that decode are patient. Half of it goes to the prompt that has waited
    longest, the rest to those that are nearest their end, so that a long prompt neither holds up
    short ones nor starves. Sequences are admitted by the service their client has had, then in
    order of arrival; a request waits until all its n completions have room. When pages run out,
    who came last gives its own back and is read again later; its tokens do not change by that.

    A request of priority p is treated as if it had come p times PRIORITY_SECONDS later. Above 0 it
    lets all others pass; below 0 it passes those of its own client alone, and only while it waits:
    no client can put itself before the others.
    """

    def __init__(
        self,
        *,
        planner: PrefillPlanner,
        allocator: PageAllocator,
        prefix: PrefixCache | None,
        limits: Limits,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.planner = planner
        self.allocator = allocator
        self.prefix = prefix
        self.limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._clock = clock
        self._fairness = Fairness()
        self._awaiting: set[Sequence] = set()
        """Those whose next page another is about to read."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue the first completion of a new request."""
        self._fairness.enter(sequence.request.options.cache_namespace)
        self.waiting.append(sequence)

    def fork(self, first: Sequence, others: list[Sequence]) -> list[tuple[int, int]]:
        """Run the other completions of a request whose prompt is cached; their room was kept.

        They share the prompt's full pages; the copies (page, to page) of the partly filled last
        one are to be made before the next step. One that finds no page waits and reads its tokens
        again.
        """
        num_full, rest = divmod(first.num_cached, self.planner.page_size)
        copies: list[tuple[int, int]] = []
        for other in others:
            self._fairness.enter(other.request.options.cache_namespace)
            if rest and not self._has_room(1):
                self.waiting.append(other)
                continue
            self.allocator.retain(first.pages[:num_full])
            other.pages = first.pages[:num_full]
            if rest:
                other.pages += self.allocator.allocate(1)
                copies.append((first.pages[num_full], other.pages[num_full]))
            other.num_cached, other.num_indexed = first.num_cached, first.num_indexed
            self.running.append(other)
        return copies

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has finished, waiting or running, and take its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)
        self._fairness.leave(sequence.request.options.cache_namespace)

    def schedule(self) -> list[ScheduledChunk]:
        """The next step's work, its pages reserved; empty when nothing is left."""
        self._admit()
        chosen: dict[Sequence, ScheduledChunk] = {}
        for sequence in sorted(self.running, key=_order):
            if not sequence.is_prefilling and sequence in self.running:
                self._drop_costly_drafts(sequence)
                self._choose(chosen, sequence, 1 + len(sequence.draft_tokens), "decode")
        waited_for = [s for s in chosen if not s.request.options.is_offline]
        self._read(chosen, self._reading_budget(len(chosen), waited_for=bool(waited_for)))
        for work in chosen.values():
            self._fairness.serve(work.sequence.request.options.cache_namespace, work.length)
        return list(chosen.values())

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Rows of the next `num_tokens` tokens are in the cache: tell the prefix cache."""
        sequence.num_cached += num_tokens
        full = sequence.num_cached // self.planner.page_size
        if self.prefix is not None and full > sequence.num_indexed:
            paths = self._page_paths(sequence, full)
            cache_namespace = sequence.request.options.cache_namespace
            self.prefix.insert(cache_namespace, sequence.tokens, paths, sequence.pages)
            sequence.num_indexed = full

    def withdraw(self, sequence: Sequence) -> None:
        """Let nobody find the rows that a sequence has read or written: one of them is at fault."""
        if self.prefix is not None:
            self.prefix.withdraw(sequence.pages)

    # --- admission -----------------------------------------------------------------------------

    def _admit(self) -> None:
        taken = sum(_room(sequence) for sequence in self.running)
        now = self._clock()
        while self.waiting:
            sequence = min(self.waiting, key=lambda sequence: self._rank(sequence, now))
            taken += _room(sequence)
            if taken > self.limits.max_sequences or not self._take_pages(sequence):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)

    def _rank(self, sequence: Sequence, now: float) -> tuple[int, bool, int, float, int]:
        request = sequence.request
        waited = int((now - request.arrived_at) / PRIORITY_SECONDS)
        gives_way = max(0, request.options.priority - waited)
        service = self._fairness.service(request.options.cache_namespace)
        place = request.arrived_at + PRIORITY_SECONDS * request.options.priority
        # Who had to make room comes back first, or work done twice would be done three times.
        return (gives_way, not sequence.was_preempted, service, place, sequence.index)

    def _take_pages(self, sequence: Sequence) -> bool:
        """Give a waiting sequence what the prefix cache has of it, if the allocator has room for
        all its tokens beside those that run, and for a page more for each of these."""
        self._match(sequence)
        promised = sum(self._missing(running) for running in self.running)
        if self._has_room(self._missing(sequence) + promised + len(self.running)):
            return True
        self._release(sequence)
        return False

    def _missing(self, sequence: Sequence) -> int:
        """Pages it needs for its tokens and the next one beyond those it has."""
        return max(0, self._num_pages(len(sequence.tokens) + 1) - len(sequence.pages))

    def _match(self, sequence: Sequence) -> None:
        """Exchange the pages of a sequence for those the prefix cache has of its tokens, where
        they are more. The last token is always read, because its logits are needed."""
        if self.prefix is None:
            return
        size = self.planner.page_size
        count = (len(sequence.tokens) - 1) // size
        paths = self._page_paths(sequence, count)
        found = self.prefix.match(
            sequence.request.options.cache_namespace, sequence.tokens[: count * size], paths
        )
        if len(found) * size <= sequence.num_cached:
            self.allocator.release(found)
        else:
            self.allocator.release(sequence.pages)
            sequence.pages = found
            sequence.num_cached, sequence.num_indexed = len(found) * size, len(found)
        # Once it has read anything it may find its own pages, which nobody saved it.
        if sequence.request.started_at is None:
            sequence.request.num_matched = sequence.num_cached

    def _page_paths(self, sequence: Sequence, count: int) -> list[str]:
        prompt = len(sequence.request.prompt)
        return [self.planner.page_path(page, prompt) for page in range(count)]

    # --- reading -------------------------------------------------------------------------------

    def _reading_budget(self, num_decoding: int, *, waited_for: bool) -> int:
        """Tokens of prompts to read in a step with `num_decoding` sequences, for which somebody
        waits or not."""
        limits = self.limits
        if not waited_for:
            is_alone = len(self.running) == 1 and not self.waiting
            return limits.lone_tokens if is_alone else limits.step_tokens
        num_reading = len(self.running) - num_decoding
        budget = limits.mixed_tokens * num_reading // num_decoding
        return min(max(budget, limits.mixed_tokens), limits.step_tokens)

    def _read(self, chosen: dict[Sequence, ScheduledChunk], budget: int) -> None:
        """Share `budget` among the sequences that read known tokens."""
        reading = self._readers()
        if not reading:
            return
        oldest, *others = reading
        shares = [(oldest, budget // 2 if others else budget)]
        shares += [(sequence, budget) for sequence in sorted(others, key=_remaining)]
        shares.append((oldest, budget))
        planned: dict[Sequence, int] = {}
        for sequence, most in shares:
            wanted = min(sequence.num_pending, most) - planned.get(sequence, 0)
            given = min(wanted, budget)
            if given > 0:
                planned[sequence] = planned.get(sequence, 0) + given
                budget -= given
        for sequence, limit in planned.items():
            if sequence in self.running:
                chunk = self.planner.next_chunk(
                    sequence.num_cached,
                    len(sequence.request.prompt),
                    len(sequence.tokens),
                    limit,
                )
                self._choose(chosen, sequence, chunk.length, chunk.path)

    def _readers(self) -> list[Sequence]:
        """Who reads in this step, in order: all but those whose next page someone before them is
        about to read. They find it in the prefix cache: a prompt that many share is read once."""
        reading = [s for s in sorted(self.running, key=_order) if s.is_prefilling]
        if self.prefix is None:
            return reading
        for sequence in self._awaiting.intersection(reading):
            self._match(sequence)
        self._awaiting = {
            sequence
            for place, sequence in enumerate(reading)
            if any(self._leads(leader, sequence) for leader in reading[:place])
        }
        return [sequence for sequence in reading if sequence not in self._awaiting]

    def _leads(self, leader: Sequence, sequence: Sequence) -> bool:
        """Whether `leader` is about to compute the very page that `sequence` needs next."""
        size, have = self.planner.page_size, sequence.num_cached
        needed = have + size
        if have % size or needed >= len(sequence.tokens):
            return False
        if not leader.num_cached < needed <= len(leader.tokens):
            return False
        if leader.request.options.cache_namespace != sequence.request.options.cache_namespace:
            return False
        count = needed // size
        return leader.tokens[:needed] == sequence.tokens[:needed] and (
            self._page_paths(leader, count) == self._page_paths(sequence, count)
        )

    # --- pages ---------------------------------------------------------------------------------

    def _choose(
        self,
        chosen: dict[Sequence, ScheduledChunk],
        sequence: Sequence,
        length: int,
        path: AttentionPath,
    ) -> None:
        """Put a sequence into the step, if pages can be found for it."""
        if self._reserve(chosen, sequence, sequence.num_cached + length):
            chosen[sequence] = ScheduledChunk(sequence, sequence.num_cached, length, path)

    def _reserve(
        self, chosen: dict[Sequence, ScheduledChunk], sequence: Sequence, num_tokens: int
    ) -> bool:
        """Extend the sequence's pages to `num_tokens` rows; whoever is last in order makes room."""
        while True:
            missing = self._num_pages(num_tokens) - len(sequence.pages)
            if missing <= 0:
                return True
            if self._has_room(missing):
                sequence.pages += self.allocator.allocate(missing)
                return True
            victim = max(self.running, key=_order)
            chosen.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False

    def _drop_costly_drafts(self, sequence: Sequence) -> None:
        """Nobody makes room for a guess."""
        wanted = self._num_pages(len(sequence.tokens) + len(sequence.draft_tokens))
        if not self._has_room(max(0, wanted - len(sequence.pages))):
            sequence.draft_tokens = []

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.draft_tokens = []
        sequence.was_preempted = True
        self.running.remove(sequence)
        self.waiting.append(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.pages)
        sequence.pages = []
        sequence.num_cached = sequence.num_indexed = 0

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.planner.page_size)

    def _has_room(self, count: int) -> bool:
        """Whether `count` pages can be taken, growing the allocator where it may grow."""
        if count <= self.allocator.num_available:
            return True
        total, limit = self.allocator.num_pages, self.limits.max_pages
        wanted = max(2 * total, total - self.allocator.num_available + count)
        if limit is not None:
            wanted = min(wanted, limit)
        if wanted > total:
            self.allocator.grow(wanted)
        return count <= self.allocator.num_available


def _order(sequence: Sequence) -> tuple[float, int]:
    """Of those that run, of all clients."""
    request = sequence.request
    late = PRIORITY_SECONDS * max(0, request.options.priority)
    return (request.arrived_at + late, sequence.index)


def _remaining(sequence: Sequence) -> tuple[int, float, int]:
    return (sequence.num_pending, *_order(sequence))


def _room(sequence: Sequence) -> int:
    """Completions the sequence stands for: all n of its request until the prompt is cached."""
    return sequence.request.params.n if sequence.awaits_first_token else 1
