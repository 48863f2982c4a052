"""Scheduler: continuous batching with chunked prefill, preemption, priorities and fair shares.

Owns the order of waiting and running sequences and the token budget of a step. Plain Python over
request records; imports no torch. Pages are `engine.kv_cache_manager`'s.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowlat.attention.path import AttentionPath
from lowlat.engine.fairness import FairShares
from lowlat.engine.kv_cache_manager import KVCacheManager
from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.prefill_planner import PREFILL_CHUNK, PrefillPlanner
from lowlat.engine.prefix import PrefixCache
from lowlat.engine.request import Sequence

if TYPE_CHECKING:
    from lowlat.engine.disk_cache import DiskCache
    from lowlat.engine.kv_transfer import KVReceiver

STEP_TOKENS = 1024
"""Prefill tokens of a step while no sequence decodes: the token budget (max_num_batched_tokens in
vLLM)."""
MIXED_TOKENS = 256
"""Prefill tokens of a step that also decodes, if no more sequences prefill than decode. They take
about as long as a step of eight decoding sequences on a CPU."""
PROMPT_LOGPROB_TOKENS = 128
"""Prefill tokens per step of a prompt whose log-probabilities are requested: their logits take 4
bytes per token and entry of the vocabulary."""
MAX_SEQUENCES = 128
"""Default of `Limits.max_sequences`."""
PRIORITY_SECONDS = 1.0
"""Seconds of waiting that offset one level of priority (aging), so that no request starves."""


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """One sequence's part of a step: `length` tokens from `start` on, draft tokens included."""

    sequence: Sequence
    start: int
    """Position of the first token: the number of cached entries."""
    length: int
    path: AttentionPath


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of a step and of the KV cache."""

    step_tokens: int = STEP_TOKENS
    lone_tokens: int = PREFILL_CHUNK
    """Prefill tokens of a step while there is only one sequence."""
    mixed_tokens: int = MIXED_TOKENS
    max_sequences: int = MAX_SEQUENCES
    """Completions that run at once (max_num_seqs in vLLM)."""
    max_pages: int | None = None
    """KV cache pages (blocks in vLLM) the cache may grow to; None: unbounded."""


class Scheduler:
    """Continuous batching: every decoding sequence runs in every step; the rest of the token budget
    is chunked prefill.

    The prefill budget grows with the ratio of prefilling to decoding sequences, up to a whole step.
    So in a burst of requests, the first few to decode do not delay the first tokens of the
    others. If all decoding sequences are offline, the budget is a whole step. Half of the budget
    goes to the prompt that has waited longest, the rest to the prompts with the fewest tokens left:
    a long prompt neither delays short ones nor starves. Sequences of the cache namespace with the
    fewest served tokens are admitted first (fair scheduling), then in order of arrival; a request
    waits until all its n completions fit. When pages run out, the last sequence in order is
    preempted and recomputed later, with the same output.

    A request of priority p counts as arriving p * PRIORITY_SECONDS later (lower first, as in
    vLLM). Until it has waited that long, it yields to requests of all namespaces. A negative
    priority overtakes requests of its own namespace only, and only while it waits: no API key can
    jump the queue.
    """

    def __init__(
        self,
        *,
        planner: PrefillPlanner,
        allocator: PageAllocator,
        prefix: PrefixCache | None,
        limits: Limits,
        disk: "DiskCache | None" = None,
        receiver: "KVReceiver | None" = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.loading: list[Sequence] = []
        """Admitted sequences whose pages are read from the disk or computed by prefill processes,
        before they run."""
        self.num_preemptions = 0
        self.planner = planner
        self.kv_cache = KVCacheManager(planner, allocator, prefix, limits.max_pages, disk, receiver)
        self._clock = clock
        self._shares = FairShares()
        self._awaiting: set[Sequence] = set()
        """Prefilling sequences whose next page another sequence is about to compute."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.loading or self.running)

    def num_loading(self, *, has_started: bool) -> int:
        """Number of loading sequences. has_started: whether their request has had a step, or is in
        remote prefill. Other threads may call it."""
        return sum((s.request.started_at is not None) is has_started for s in [*self.loading])

    def add(self, sequence: Sequence) -> None:
        """Queue the first completion of a new request."""
        self._shares.enter(sequence.request.options.cache_namespace)
        self.waiting.append(sequence)

    def fork(self, first: Sequence, others: list[Sequence]) -> list[tuple[int, int]]:
        """Run the other completions of a request whose prompt is cached; admission counted them.

        They share the prompt's full pages; the caller makes the returned copies (page, to page) of
        the partly filled last one before the next step. A completion without a free page waits and
        recomputes its tokens.
        """
        is_partial = first.num_cached % self.planner.page_size != 0
        copies: list[tuple[int, int]] = []
        for other in others:
            self._shares.enter(other.request.options.cache_namespace)
            if is_partial and not self.kv_cache.has_free(1):
                self.waiting.append(other)
                continue
            copy = self.kv_cache.fork(first, other)
            if copy is not None:
                copies.append(copy)
            self.running.append(other)
        return copies

    def remove(self, sequence: Sequence) -> None:
        """Remove a finished sequence, waiting or running, and release its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.loading:
            self._stop_loading(sequence)
        else:
            self.waiting.remove(sequence)
        self.kv_cache.touch(sequence)
        self.kv_cache.release(sequence)
        self._shares.leave(sequence.request.options.cache_namespace)

    def load(self, step_seconds: float) -> None:
        """Load pages of admitted sequences for a while, from the disk or prefill processes; those
        that have all of them run from here on. step_seconds: time of the last step."""
        for sequence in self.kv_cache.load(step_seconds if self.running else None):
            self.loading.remove(sequence)
            self.running.append(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The chunks of the next step, their pages reserved; empty if no sequence is left."""
        self._admit()
        chosen: dict[Sequence, ScheduledChunk] = {}
        for sequence in sorted(self.running, key=_order):
            if not sequence.is_prefilling and sequence in self.running:
                self._drop_drafts_without_pages(sequence)
                self._choose(chosen, sequence, 1 + len(sequence.draft_tokens), "decode")
        online = [s for s in chosen if not s.request.options.is_offline]
        self._prefill(chosen, self._prefill_budget(len(chosen), has_online=bool(online)))
        for chunk in chosen.values():
            self._shares.serve(chunk.sequence.request.options.cache_namespace, chunk.length)
        return list(chosen.values())

    # --- admission -----------------------------------------------------------------------------

    def _admit(self) -> None:
        """Move waiting sequences to the running ones, as far as completions and pages allow."""
        taken = sum(_num_completions(sequence) for sequence in [*self.running, *self.loading])
        now = self._clock()
        while self.waiting:
            sequence = min(self.waiting, key=lambda sequence: self._rank(sequence, now))
            taken += _num_completions(sequence)
            if taken > self.limits.max_sequences or not self._take_pages(sequence):
                return
            self.waiting.remove(sequence)
            is_loading = self.kv_cache.begin_load(sequence)
            (self.loading if is_loading else self.running).append(sequence)

    def _rank(self, sequence: Sequence, now: float) -> tuple[int, bool, int, float, int]:
        request = sequence.request
        waited = int((now - request.arrived_at) / PRIORITY_SECONDS)
        gives_way = max(0, request.options.priority - waited)
        served = self._shares.served(request.options.cache_namespace)
        place = request.arrived_at + PRIORITY_SECONDS * request.options.priority
        # Preempted sequences come first: otherwise they would be recomputed again and again.
        return (gives_way, not sequence.was_preempted, served, place, sequence.index)

    def _take_pages(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its prefix cache hits if enough pages are free: for the rest of
        its tokens, for the running sequences' tokens, and one more per running sequence."""
        self.kv_cache.match(sequence)
        admitted = [*self.running, *self.loading]
        promised = sum(self._num_missing(other) for other in admitted)
        if self.kv_cache.has_free(self._num_missing(sequence) + promised + len(admitted)):
            return True
        self.kv_cache.release(sequence)
        return False

    def _num_missing(self, sequence: Sequence) -> int:
        """Pages that it lacks for its tokens and the next one."""
        return self.kv_cache.num_missing(sequence, len(sequence.tokens) + 1)

    # --- chunked prefill -----------------------------------------------------------------------

    def _prefill_budget(self, num_decoding: int, *, has_online: bool) -> int:
        """Prefill tokens of a step with `num_decoding` decoding sequences; has_online: whether any
        of these is not offline."""
        limits = self.limits
        if not has_online:
            is_alone = len(self.running) == 1 and not self.waiting
            return limits.lone_tokens if is_alone else limits.step_tokens
        num_prefilling = len(self.running) - num_decoding
        budget = limits.mixed_tokens * num_prefilling // num_decoding
        return min(max(budget, limits.mixed_tokens), limits.step_tokens)

    def _prefill(self, chosen: dict[Sequence, ScheduledChunk], budget: int) -> None:
        """Share `budget` tokens among the prefilling sequences."""
        prefilling = self._prefilling()
        if not prefilling:
            return
        oldest, *others = prefilling
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
                if sequence.request.needs_prompt_logprobs:
                    limit = min(limit, PROMPT_LOGPROB_TOKENS)
                length, path = self.planner.next_chunk(
                    sequence.num_cached,
                    len(sequence.request.prompt),
                    len(sequence.tokens),
                    limit,
                )
                self._choose(chosen, sequence, length, path)

    def _prefilling(self) -> list[Sequence]:
        """Sequences that prefill in this step, in order: all but those whose next page an earlier
        one is about to compute. They find it in the prefix cache, so a shared prompt is computed
        once."""
        prefilling = [s for s in sorted(self.running, key=_order) if s.is_prefilling]
        if self.kv_cache.prefix is None:
            return prefilling
        for sequence in self._awaiting.intersection(prefilling):
            self.kv_cache.match(sequence)
        self._awaiting = {
            sequence
            for place, sequence in enumerate(prefilling)
            if any(self.kv_cache.is_next_page_of(leader, sequence) for leader in prefilling[:place])
        }
        return [sequence for sequence in prefilling if sequence not in self._awaiting]

    # --- pages and preemption ------------------------------------------------------------------

    def _choose(
        self,
        chosen: dict[Sequence, ScheduledChunk],
        sequence: Sequence,
        length: int,
        path: AttentionPath,
    ) -> None:
        """Add a sequence to the step if it gets its pages; preempts the last running sequences for
        them."""
        while not self.kv_cache.extend(sequence, sequence.num_cached + length):
            victim = max([*self.running, *self.loading], key=_order)
            chosen.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return
        chosen[sequence] = ScheduledChunk(sequence, sequence.num_cached, length, path)

    def _drop_drafts_without_pages(self, sequence: Sequence) -> None:
        """Drop draft tokens that lack free pages: they preempt no sequence."""
        wanted = len(sequence.tokens) + len(sequence.draft_tokens)
        if not self.kv_cache.has_free(self.kv_cache.num_missing(sequence, wanted)):
            sequence.draft_tokens = []

    def _preempt(self, sequence: Sequence) -> None:
        """Release the pages of an admitted sequence; it waits and is recomputed."""
        self.kv_cache.release(sequence)
        sequence.draft_tokens = []
        sequence.was_preempted = True
        if sequence in self.loading:
            self._stop_loading(sequence)
        else:
            self.running.remove(sequence)
        self.waiting.append(sequence)
        self.num_preemptions += 1

    def _stop_loading(self, sequence: Sequence) -> None:
        self.loading.remove(sequence)
        self.kv_cache.stop_load(sequence)


def _order(sequence: Sequence) -> tuple[float, int]:
    """Order of running sequences, across namespaces."""
    request = sequence.request
    late = PRIORITY_SECONDS * max(0, request.options.priority)
    return (request.arrived_at + late, sequence.index)


def _remaining(sequence: Sequence) -> tuple[int, float, int]:
    return (sequence.num_pending, *_order(sequence))


def _num_completions(sequence: Sequence) -> int:
    """Completions the sequence stands for: all n of its request until the prompt is cached."""
    return sequence.request.params.n if sequence.awaits_first_token else 1
