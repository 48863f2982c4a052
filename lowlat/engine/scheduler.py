"""Who runs in the next step, and on which pages: plain Python over request records, no tensors.

Owns the order of waiting and running sequences, the token budget of a step, and the pages that
sequences hold: taken from the pool and the prefix cache, given back when a sequence ends or has to
make room. What the tokens are is the engine's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from lowlat.attention.forms import Form
from lowlat.engine.fairness import Fairness
from lowlat.engine.pages import PagePool
from lowlat.engine.prefix import PrefixCache
from lowlat.engine.reading import PREFILL_CHUNK, Reader
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
class Work:
    """One sequence's share of a step: `length` tokens from `start` on, drafts included."""

    sequence: Sequence
    start: int
    """Rows it has in the cache."""
    length: int
    form: Form


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
        reader: Reader,
        pool: PagePool,
        prefix: PrefixCache | None,
        limits: Limits,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.reader = reader
        self.pool = pool
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
        self._fairness.enter(sequence.request.options.salt)
        self.waiting.append(sequence)

    def fork(self, first: Sequence, others: list[Sequence]) -> list[tuple[int, int]]:
        """Run the other completions of a request whose prompt is cached; their room was kept.

        They share the prompt's full pages; the copies (page, to page) of the partly filled last
        one are to be made before the next step. One that finds no page waits and reads its tokens
        again.
        """
        num_full, rest = divmod(first.num_cached, self.reader.page_size)
        copies: list[tuple[int, int]] = []
        for other in others:
            self._fairness.enter(other.request.options.salt)
            if rest and not self._has_room(1):
                self.waiting.append(other)
                continue
            self.pool.retain(first.pages[:num_full])
            other.pages = first.pages[:num_full]
            if rest:
                other.pages += self.pool.allocate(1)
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
        self._fairness.leave(sequence.request.options.salt)

    def schedule(self) -> list[Work]:
        """The next step's work, its pages reserved; empty when nothing is left."""
        self._admit()
        chosen: dict[Sequence, Work] = {}
        for sequence in sorted(self.running, key=_order):
            if not sequence.is_reading and sequence in self.running:
                self._drop_costly_drafts(sequence)
                self._choose(chosen, sequence, 1 + len(sequence.drafts), "stream")
        waited_for = [s for s in chosen if not s.request.options.is_patient]
        self._read(chosen, self._reading_budget(len(chosen), waited_for=bool(waited_for)))
        for work in chosen.values():
            self._fairness.serve(work.sequence.request.options.salt, work.length)
        return list(chosen.values())

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Rows of the next `num_tokens` tokens are in the cache: tell the prefix cache."""
        sequence.num_cached += num_tokens
        full = sequence.num_cached // self.reader.page_size
        if self.prefix is not None and full > sequence.num_indexed:
            forms = self._page_forms(sequence, full)
            salt = sequence.request.options.salt
            self.prefix.insert(salt, sequence.tokens, forms, sequence.pages)
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
        service = self._fairness.service(request.options.salt)
        place = request.arrived_at + PRIORITY_SECONDS * request.options.priority
        # Who had to make room comes back first, or work done twice would be done three times.
        return (gives_way, not sequence.was_preempted, service, place, sequence.index)

    def _take_pages(self, sequence: Sequence) -> bool:
        """Give a waiting sequence what the prefix cache has of it, if the pool has room for all
        its tokens beside those that run, and for a page more for each of these."""
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
        size = self.reader.page_size
        count = (len(sequence.tokens) - 1) // size
        forms = self._page_forms(sequence, count)
        found = self.prefix.match(
            sequence.request.options.salt, sequence.tokens[: count * size], forms
        )
        if len(found) * size <= sequence.num_cached:
            self.pool.release(found)
        else:
            self.pool.release(sequence.pages)
            sequence.pages = found
            sequence.num_cached, sequence.num_indexed = len(found) * size, len(found)
        # Once it has read anything it may find its own pages, which nobody saved it.
        if sequence.request.started_at is None:
            sequence.request.num_matched = sequence.num_cached

    def _page_forms(self, sequence: Sequence, count: int) -> list[str]:
        prompt = len(sequence.request.prompt)
        return [self.reader.page_form(page, prompt) for page in range(count)]

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

    def _read(self, chosen: dict[Sequence, Work], budget: int) -> None:
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
                piece = self.reader.next_piece(
                    sequence.num_cached,
                    len(sequence.request.prompt),
                    len(sequence.tokens),
                    limit,
                )
                self._choose(chosen, sequence, piece.length, piece.form)

    def _readers(self) -> list[Sequence]:
        """Who reads in this step, in order: all but those whose next page someone before them is
        about to read. They find it in the prefix cache: a prompt that many share is read once."""
        reading = [s for s in sorted(self.running, key=_order) if s.is_reading]
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
        size, have = self.reader.page_size, sequence.num_cached
        needed = have + size
        if have % size or needed >= len(sequence.tokens):
            return False
        if not leader.num_cached < needed <= len(leader.tokens):
            return False
        if leader.request.options.salt != sequence.request.options.salt:
            return False
        count = needed // size
        return leader.tokens[:needed] == sequence.tokens[:needed] and (
            self._page_forms(leader, count) == self._page_forms(sequence, count)
        )

    # --- pages ---------------------------------------------------------------------------------

    def _choose(
        self, chosen: dict[Sequence, Work], sequence: Sequence, length: int, form: Form
    ) -> None:
        """Put a sequence into the step, if pages can be found for it."""
        if self._reserve(chosen, sequence, sequence.num_cached + length):
            chosen[sequence] = Work(sequence, sequence.num_cached, length, form)

    def _reserve(self, chosen: dict[Sequence, Work], sequence: Sequence, num_tokens: int) -> bool:
        """Extend the sequence's pages to `num_tokens` rows; whoever is last in order makes room."""
        while True:
            missing = self._num_pages(num_tokens) - len(sequence.pages)
            if missing <= 0:
                return True
            if self._has_room(missing):
                sequence.pages += self.pool.allocate(missing)
                return True
            victim = max(self.running, key=_order)
            chosen.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False

    def _drop_costly_drafts(self, sequence: Sequence) -> None:
        """Nobody makes room for a guess."""
        wanted = self._num_pages(len(sequence.tokens) + len(sequence.drafts))
        if not self._has_room(max(0, wanted - len(sequence.pages))):
            sequence.drafts = []

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.drafts = []
        sequence.was_preempted = True
        self.running.remove(sequence)
        self.waiting.append(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.num_cached = sequence.num_indexed = 0

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.reader.page_size)

    def _has_room(self, count: int) -> bool:
        """Whether `count` pages can be taken, growing the pool where it may grow."""
        if count <= self.pool.num_available:
            return True
        total, limit = self.pool.num_pages, self.limits.max_pages
        wanted = max(2 * total, total - self.pool.num_available + count)
        if limit is not None:
            wanted = min(wanted, limit)
        if wanted > total:
            self.pool.grow(wanted)
        return count <= self.pool.num_available


def _order(sequence: Sequence) -> tuple[float, int]:
    """Of those that run, of all clients."""
    request = sequence.request
    late = PRIORITY_SECONDS * max(0, request.options.priority)
    return (request.arrived_at + late, sequence.index)


def _remaining(sequence: Sequence) -> tuple[int, float, int]:
    return (sequence.num_pending, *_order(sequence))


def _room(sequence: Sequence) -> int:
    """Completions the sequence stands for: all n of its request until the prompt is cached."""
    return sequence.request.params.n if sequence.is_prefilling else 1
