"""Engine statistics: counters, gauges and histograms (throughput, TTFT, inter-token latency).

Owns the arithmetic; the server owns names and text formats. The engine's thread records, any thread
may take a snapshot.
"""

import bisect
import threading
from dataclasses import dataclass, field

from lowlat.engine.request import Request, Sequence

SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6, 5.0)
LONG_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of durations in seconds, by upper bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    """Values in each bucket, one more than bounds: the last has no upper bound. Not cumulative."""
    sum: float
    """Sum of the values in seconds."""

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Snapshot of an engine; counters count from its start."""

    queued: int
    """Waiting sequences, gauge."""
    running: int
    """Running sequences, gauge."""
    steps: int
    prompt_tokens: int
    """Prompt tokens of started requests."""
    cached_prompt_tokens: int
    """Those of them found in the prefix cache."""
    generated_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    """Draft tokens that equal what the model sampled."""
    pages_total: int
    pages_used: int
    pages_cached: int
    page_tokens: int
    """Tokens per KV cache page."""
    finished: dict[str, int]
    """Completions by finish reason."""
    queue_time: Histogram
    """From arrival to the first step."""
    ttft: Histogram
    """From arrival to the first token (time to first token)."""
    itl: Histogram
    """Between consecutive tokens of one sequence (inter-token latency)."""
    e2e: Histogram
    """From arrival to a completion's end."""


@dataclass(slots=True)
class _Counts:
    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def snapshot(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total)


class StatsRecorder:
    """Collects what EngineStats reports."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps = 0
        self._prompt_tokens = 0
        self._cached_prompt_tokens = 0
        self._generated_tokens = 0
        self._drafted = 0
        self._accepted = 0
        self._finished: dict[str, int] = {}
        self._queue_time = _Counts(LONG_SECONDS)
        self._ttft = _Counts(LONG_SECONDS)
        self._itl = _Counts(SHORT_SECONDS)
        self._e2e = _Counts(LONG_SECONDS)

    def started(self, request: Request) -> None:
        assert request.started_at is not None
        with self._lock:
            self._prompt_tokens += len(request.prompt)
            self._cached_prompt_tokens += request.num_matched
            self._queue_time.add(request.started_at - request.arrived_at)

    def generated(self, sequence: Sequence, now: float) -> None:
        """Record a sampled token; called before the sequence's clocks are set."""
        with self._lock:
            self._generated_tokens += 1
            if sequence.last_token_at is None:
                self._ttft.add(now - sequence.request.arrived_at)
            else:
                self._itl.add(now - sequence.last_token_at)

    def verified(self, *, drafted: int, accepted: int) -> None:
        with self._lock:
            self._drafted += drafted
            self._accepted += accepted

    def stepped(self) -> None:
        with self._lock:
            self._steps += 1

    def finished(self, sequence: Sequence, now: float) -> None:
        reason = str(sequence.finish_reason)
        with self._lock:
            self._finished[reason] = self._finished.get(reason, 0) + 1
            self._e2e.add(now - sequence.request.arrived_at)

    def snapshot(
        self,
        *,
        queued: int,
        running: int,
        preemptions: int,
        pages_total: int,
        pages_used: int,
        pages_cached: int,
        page_tokens: int,
    ) -> EngineStats:
        """Everything recorded, with the current gauges."""
        with self._lock:
            return EngineStats(
                queued=queued,
                running=running,
                steps=self._steps,
                prompt_tokens=self._prompt_tokens,
                cached_prompt_tokens=self._cached_prompt_tokens,
                generated_tokens=self._generated_tokens,
                preemptions=preemptions,
                drafted_tokens=self._drafted,
                accepted_tokens=self._accepted,
                pages_total=pages_total,
                pages_used=pages_used,
                pages_cached=pages_cached,
                page_tokens=page_tokens,
                finished=dict(self._finished),
                queue_time=self._queue_time.snapshot(),
                ttft=self._ttft.snapshot(),
                itl=self._itl.snapshot(),
                e2e=self._e2e.snapshot(),
            )
