"""Engine statistics: counters, gauges and histograms (throughput, TTFT, inter-token latency).

The server defines the names of metrics and their text formats. The engine's thread records, any
thread may take a snapshot.
"""

import bisect
import copy
import threading
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial

from lowlat.engine.request import Request, Sequence

SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6, 5.0)
LONG_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)


DROP_REASONS = (
    *("truncated", "foreign", "corrupt", "unreadable"),
    *("late", "disk_full", "write_error"),
)
"""Why pages of the prefix cache on disk are not used (`page_folder.Damage`) or not written (late:
evicted from memory before)."""


@dataclass(slots=True)
class Histogram:
    """Counts of durations in seconds, by upper bounds."""

    bounds: tuple[float, ...]
    counts: list[int]
    """Values in each of the len(bounds) + 1 buckets, not cumulative; the last is +Inf."""
    sum: float = 0.0
    """Sum of the values in seconds."""

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds


def _empty(bounds: tuple[float, ...]) -> Histogram:
    return Histogram(bounds, [0] * (len(bounds) + 1))


@dataclass(kw_only=True, slots=True)
class DiskCacheStats:
    """Counters of the prefix cache on disk."""

    hit_tokens: int = 0
    """Tokens whose entries were read from the disk."""
    read_bytes: int = 0
    written_bytes: int = 0
    evicted_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Pages that were not used or not written, by DROP_REASONS."""


class DiskCacheRecorder:
    """Collects DiskCacheStats from the engine's thread and the writer's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = DiskCacheStats()

    def read(self, num_bytes: int, num_tokens: int) -> None:
        with self._lock:
            self._stats.read_bytes += num_bytes
            self._stats.hit_tokens += num_tokens

    def wrote(self, num_bytes: int) -> None:
        with self._lock:
            self._stats.written_bytes += num_bytes

    def evicted(self, num_bytes: int) -> None:
        with self._lock:
            self._stats.evicted_bytes += num_bytes

    def dropped(self, reason: str) -> None:
        """Record a page that was not used or not written."""
        with self._lock:
            self._stats.dropped[reason] = self._stats.dropped.get(reason, 0) + 1

    def snapshot(self) -> DiskCacheStats:
        with self._lock:
            return copy.deepcopy(self._stats)


@dataclass(kw_only=True, slots=True)
class KVTransferStats:
    """Counters of pages from prefill processes."""

    tokens: int = 0
    bytes: int = 0
    damaged: int = 0
    """Pages that arrived damaged."""


class KVTransferRecorder:
    """Collects KVTransferStats from the engine's thread."""

    def __init__(self) -> None:
        self._stats = KVTransferStats()

    def received(self, num_bytes: int, num_tokens: int) -> None:
        self._stats.bytes += num_bytes
        self._stats.tokens += num_tokens

    def damaged(self) -> None:
        self._stats.damaged += 1

    def snapshot(self) -> KVTransferStats:
        return copy.copy(self._stats)


@dataclass(kw_only=True, slots=True)
class EngineStats:
    """Statistics of an engine; counters count from its start."""

    queued: int = 0
    """Waiting sequences, gauge."""
    running: int = 0
    """Running sequences and those in remote prefill, gauge."""
    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of started requests."""
    cached_prompt_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    generated_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Draft tokens that equal what the model sampled."""
    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    expert_loads: Mapping[int, SequenceOf[int]] = field(default_factory=dict)
    """Tokens of every routed expert by layer; empty without EPLB."""
    disk: DiskCacheStats = field(default_factory=DiskCacheStats)
    """The prefix cache on disk; zeros without one."""
    transfer: KVTransferStats = field(default_factory=KVTransferStats)
    """Pages from prefill processes; zeros without them."""
    finished: dict[str, int] = field(default_factory=dict)
    """Completions by finish reason."""
    queue_time: Histogram = field(default_factory=partial(_empty, LONG_SECONDS))
    """From arrival to the first step."""
    ttft: Histogram = field(default_factory=partial(_empty, LONG_SECONDS))
    """From arrival to the first token (time to first token)."""
    itl: Histogram = field(default_factory=partial(_empty, SHORT_SECONDS))
    """Between consecutive tokens of one sequence (inter-token latency; its mean over a completion
    is TPOT, time per output token)."""
    e2e: Histogram = field(default_factory=partial(_empty, LONG_SECONDS))
    """From arrival to a completion's end."""


class StatsRecorder:
    """Collects what EngineStats reports."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = EngineStats()

    def started(self, request: Request) -> None:
        assert request.started_at is not None
        with self._lock:
            self._stats.prompt_tokens += len(request.prompt)
            self._stats.cached_prompt_tokens += request.num_matched
            self._stats.queue_time.add(request.started_at - request.arrived_at)

    def generated(self, sequence: Sequence, now: float) -> None:
        """Record a sampled token; called before the sequence's clocks are set."""
        with self._lock:
            self._stats.generated_tokens += 1
            if sequence.last_token_at is None:
                self._stats.ttft.add(now - sequence.request.arrived_at)
            else:
                self._stats.itl.add(now - sequence.last_token_at)

    def verified(self, *, drafted: int, accepted: int) -> None:
        with self._lock:
            self._stats.drafted_tokens += drafted
            self._stats.accepted_tokens += accepted

    def stepped(self) -> int:
        """Record a step; returns the number of steps."""
        with self._lock:
            self._stats.steps += 1
            return self._stats.steps

    def finished(self, sequence: Sequence, now: float) -> None:
        reason = str(sequence.finish_reason)
        with self._lock:
            self._stats.finished[reason] = self._stats.finished.get(reason, 0) + 1
            self._stats.e2e.add(now - sequence.request.arrived_at)

    def snapshot(
        self,
        disk: DiskCacheStats | None = None,
        transfer: KVTransferStats | None = None,
        expert_loads: Mapping[int, SequenceOf[int]] | None = None,
        **gauges: int,
    ) -> EngineStats:
        """A copy of everything recorded, with the current `gauges`, fields of EngineStats."""
        disk, transfer = disk or DiskCacheStats(), transfer or KVTransferStats()
        with self._lock:
            stats = copy.deepcopy(self._stats)
        loads = expert_loads or {}
        return replace(stats, disk=disk, transfer=transfer, expert_loads=loads, **gauges)
