"""Request table: the unfinished requests of an engine, their samplers, and how completions end.

Which sequences run and on which pages is `engine.scheduler`'s.
"""

import time
from dataclasses import replace

from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import FinishReason, Request, RequestOptions, Sequence, TokenEvent
from lowlat.engine.sampler import SampledToken, SequenceSampler
from lowlat.engine.scheduler import Scheduler
from lowlat.engine.stats import StatsRecorder


class RequestTable:
    """Unfinished requests by id. A sequence that ends leaves the scheduler and releases its
    pages."""

    def __init__(
        self,
        scheduler: Scheduler,
        recorder: StatsRecorder,
        *,
        vocab_size: int,
        eos_ids: frozenset[int],
    ) -> None:
        """eos_ids: the model's end-of-sequence tokens."""
        self._eos_ids = eos_ids
        self._scheduler = scheduler
        self._recorder = recorder
        self._vocab_size = vocab_size
        self._requests: dict[int, Request] = {}
        self._samplers: dict[Sequence, SequenceSampler] = {}
        self._next_id = 0

    def add(
        self,
        prompt: tuple[int, ...],
        params: TokenSamplingParams,
        options: RequestOptions,
        max_outputs: int,
    ) -> Request:
        """A new request, its first completion queued."""
        request = Request(
            id=self._next_id,
            prompt=prompt,
            params=params,
            options=options,
            max_outputs=max_outputs,
            arrived_at=time.perf_counter(),
        )
        self._next_id += 1
        sequence = self._new_sequence(request, 0)
        self._requests[request.id] = request
        request.sequences.append(sequence)
        self._scheduler.add(sequence)
        return request

    def get(self, request_id: int) -> Request | None:
        """The request, or None if it has ended."""
        return self._requests.get(request_id)

    def sampler(self, sequence: Sequence) -> SequenceSampler:
        """The sampling state of an unfinished sequence."""
        return self._samplers[sequence]

    def sequences(self) -> list[Sequence]:
        """All sequences of unfinished requests, finished ones included."""
        return [s for request in self._requests.values() for s in request.sequences]

    def late(self, now: float) -> list[Request]:
        """Requests whose deadline is at or before the clock `now`."""
        found = []
        for request in self._requests.values():
            deadline = request.options.deadline
            if deadline is not None and deadline <= now:
                found.append(request)
        return found

    def start(self, request: Request, now: float) -> None:
        """Record the first step of a request; later calls have no effect."""
        if request.started_at is None:
            request.started_at = now
            self._recorder.started(request)

    def make_others(self, first: Sequence) -> list[Sequence]:
        """Completions 1 to n - 1 of `first`'s request, whose prompt is complete."""
        request = first.request
        return [self._new_sequence(request, index) for index in range(1, request.params.n)]

    def append(self, sequence: Sequence, sampled: SampledToken) -> TokenEvent:
        """Append a sampled token; the sequence may end with it."""
        request, token = sequence.request, sampled.token
        sampler = self._samplers[sequence]
        is_end = token in self._end_ids(request)
        if not is_end:
            sampler.record(token)
        sequence.tokens.append(token)
        self._time(sequence)
        reason: FinishReason | None = None
        if is_end or (sampler.constraint is not None and sampler.constraint.is_done):
            reason = "stop"
        elif sequence.num_outputs == request.max_outputs:
            reason = "length"
        if reason is not None:
            self.finish(sequence, reason)
        event = TokenEvent(request.id, sequence.index, token, sampled.logprob, sampled.top, reason)
        return replace(event, is_text=False) if is_end else event

    def fail(
        self, sequence: Sequence, error: str, *, is_grammar_error: bool = False
    ) -> list[TokenEvent]:
        """End a sequence by an error; returns the ends of all completions that it stands for."""
        ends = self.end(sequence, "error")
        return [replace(end, error=error, is_grammar_error=is_grammar_error) for end in ends]

    def end(self, sequence: Sequence, reason: FinishReason) -> list[TokenEvent]:
        """End a sequence without a token; returns the ends of all completions it stands for."""
        ends = [
            TokenEvent(sequence.request.id, index, None, finish_reason=reason)
            for index in _completions(sequence)
        ]
        self.finish(sequence, reason)
        return ends

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence and release its pages; with its last sequence the request is removed.

        References to the constraint are dropped at once: the records form reference cycles, so a
        large grammar would wait for the garbage collector.
        """
        if sequence.finish_reason is not None:
            raise AssertionError("a sequence has ended twice")
        sequence.finish_reason = reason
        del self._samplers[sequence]
        self._scheduler.remove(sequence)
        request = sequence.request
        is_last = all(s.finish_reason is not None for s in request.sequences)
        now = time.perf_counter()
        for _ in _completions(sequence):
            self._recorder.finished(sequence, now)
        if is_last:
            request.options = replace(request.options, constraint=None)
            del self._requests[request.id]

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        constraint = request.options.constraint
        sequence = Sequence(request=request, index=index, tokens=list(request.prompt))
        self._samplers[sequence] = SequenceSampler(
            request.params,
            request.prompt,
            index,
            self._vocab_size,
            None if constraint is None else constraint.start(),
            end_ids=self._end_ids(request),
            bad_words=request.options.bad_words,
        )
        return sequence

    def _end_ids(self, request: Request) -> frozenset[int]:
        """The tokens that end completions of `request`."""
        ids = request.options.stop_token_ids.union(request.params.stop_token_ids)
        return ids if request.params.ignore_eos else ids | self._eos_ids

    def _time(self, sequence: Sequence) -> None:
        now = time.perf_counter()
        self._recorder.generated(sequence, now)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        sequence.last_token_at = now


def _completions(sequence: Sequence) -> range:
    """Indices of the completions that a sequence stands for: all n of its request until the prompt
    is complete."""
    request = sequence.request
    if len(request.sequences) < request.params.n:
        return range(request.params.n)
    return range(sequence.index, sequence.index + 1)
