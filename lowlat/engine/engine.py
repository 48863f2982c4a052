"""Add requests, step, abort: the glue between scheduler, runner and sampler. Token ids only.

Owns the life of a request: validation against the model, forking into n completions, finish
reasons, timing. One thread calls it.
"""

import time
from collections.abc import Sequence as SequenceOf

from lowlat.engine.params import SamplingParams
from lowlat.engine.request import Chunk, Event, FinishReason, Request, Sequence
from lowlat.engine.runner import Runner
from lowlat.engine.sampler import Sampled, SequenceSampler, sample
from lowlat.engine.scheduler import Scheduler, Work
from lowlat.utils.errors import UserError

PREFILL_CHUNK = 1024
MAX_SEQUENCES = 128


class Engine:
    """Generates for any number of requests at once.

    `context` is the most tokens prompt and output may have together. Prompts are read
    `prefill_chunk` tokens at a time; up to `max_sequences` completions decode together, one token
    each per step.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        context: int,
        eos_ids: frozenset[int],
        prefill_chunk: int = PREFILL_CHUNK,
        max_sequences: int = MAX_SEQUENCES,
    ) -> None:
        self.runner = runner
        self.context = context
        self.eos_ids = eos_ids
        self.scheduler = Scheduler(prefill_chunk=prefill_chunk, max_sequences=max_sequences)
        self._requests: dict[int, Request] = {}
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, prompt: SequenceOf[int], params: SamplingParams) -> Request:
        """Queue a request. Raises UserError, queuing nothing, where the model cannot serve it.

        The returned record is to be read only; it stays valid after the request has ended.
        """
        room = self._check(prompt, params)
        request = Request(
            id=self._next_id,
            prompt=tuple(prompt),
            params=params,
            max_outputs=room if params.max_tokens is None else params.max_tokens,
        )
        self._next_id += 1
        self._requests[request.id] = request
        request.sequences.append(self._new_sequence(request, 0))
        self.scheduler.add(request.sequences[0])
        return request

    def step(self) -> list[Event]:
        """Run the model once over what the scheduler chose; the events that came of it."""
        work = self.scheduler.schedule()
        if not work:
            return []
        now = time.perf_counter()
        for item in work:
            if item.sequence.request.started_at is None:
                item.sequence.request.started_at = now
        logits = self.runner.run([self._chunk(item) for item in work])
        for item in work:
            item.sequence.num_cached += item.length
        ready = [item.sequence for item in work if item.sequence.num_pending == 0]
        # A prompt that is read gives all n completions their first token from the same row.
        rows = [row for row, first in enumerate(ready) for _ in range(self._width(first))]
        sequences = [sequence for first in ready for sequence in self._fork(first)]
        if len(rows) > len(ready):
            logits = logits[rows]
        sampled = sample(logits, [sequence.sampler for sequence in sequences]) if rows else []
        now = time.perf_counter()
        return [self._advance(*pair, now) for pair in zip(sequences, sampled, strict=True)]

    def stop(self, request_id: int, index: int) -> None:
        """End one running completion: the caller found a stop string in its text."""
        self._finish(self._requests[request_id].sequences[index], "stop")

    def abort(self, request_id: int) -> None:
        """End what has not ended of a request; one that has ended is left alone."""
        request = self._requests.get(request_id)
        for sequence in list(request.sequences) if request else []:
            if sequence.finish_reason is None:
                self._finish(sequence, "abort")

    def check_integrity(self) -> None:
        """Raise AssertionError unless exactly the pages of unfinished sequences are in use."""
        sequences = [s for request in self._requests.values() for s in request.sequences]
        assert all(not s.pages for s in sequences if s.finish_reason is not None)
        queued = [*self.scheduler.waiting, *self.scheduler.running]
        unfinished = [s for s in sequences if s.finish_reason is None]
        assert {id(s) for s in queued} == {id(s) for s in unfinished}
        self.runner.check_integrity([s.pages for s in sequences])

    def _check(self, prompt: SequenceOf[int], params: SamplingParams) -> int:
        """Tokens the context leaves for output, at least 1."""
        vocab_size = self.runner.model.config.vocab_size
        if len(prompt) == 0:
            raise UserError("the prompt is empty; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(f"the prompt has a token id outside the vocabulary of {vocab_size}")
        room = self.context - len(prompt)
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the context is {self.context}, of which "
                "one must be left for the answer; shorten the prompt"
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise UserError(
                f"max_tokens {params.max_tokens} and a prompt of {len(prompt)} tokens exceed the "
                f"context of {self.context}; set max_tokens to at most {room} or leave it out"
            )
        if params.n > self.scheduler.max_sequences:
            raise UserError(
                f"n {params.n} exceeds the {self.scheduler.max_sequences} completions that may "
                "run at once; lower n"
            )
        if params.logit_bias and max(params.logit_bias) >= vocab_size:
            raise UserError(
                f"logit_bias names token {max(params.logit_bias)}, outside the vocabulary of "
                f"{vocab_size}"
            )
        return room

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        sampler = SequenceSampler(
            request.params, request.prompt, index, self.runner.model.config.vocab_size
        )
        return Sequence(request=request, index=index, tokens=list(request.prompt), sampler=sampler)

    def _chunk(self, work: Work) -> Chunk:
        """The work as the runner wants it, with pages reserved."""
        sequence = work.sequence
        start, end = sequence.num_cached, sequence.num_cached + work.length
        self.runner.reserve(sequence.pages, end)
        return Chunk(
            tokens=sequence.tokens[start:end],
            start=start,
            pages=tuple(sequence.pages),
            num_logits=1 if end == len(sequence.tokens) else 0,
        )

    def _width(self, sequence: Sequence) -> int:
        return sequence.request.params.n if sequence.is_prefilling else 1

    def _fork(self, first: Sequence) -> list[Sequence]:
        """The completions that share `first`'s logits: n where the prompt was just read."""
        others = [
            self._new_sequence(first.request, index) for index in range(1, self._width(first))
        ]
        for other in others:
            other.pages = self.runner.fork(first.pages, first.num_cached)
            other.num_cached = first.num_cached
        # Together and last: an interrupt before leaves the request as it was.
        first.request.sequences += others
        self.scheduler.fork(others)
        return [first, *others]

    def _advance(self, sequence: Sequence, sampled: Sampled | None, now: float) -> Event:
        """Append the chosen token and say whether the sequence ends with it."""
        request = sequence.request
        if sampled is None:
            self._finish(sequence, "error")
            return Event(request.id, sequence.index, None, finish_reason="error")
        sequence.tokens.append(sampled.token)
        sequence.sampler.record(sampled.token)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        sequence.last_token_at = now
        reason: FinishReason | None = None
        if sampled.token in self.eos_ids and not request.params.ignore_eos:
            reason = "stop"
        elif sequence.num_outputs == request.max_outputs:
            reason = "length"
        if reason is not None:
            self._finish(sequence, reason)
        return Event(
            request.id, sequence.index, sampled.token, sampled.logprob, sampled.top, reason
        )

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence and give its pages back; with its request's last, forget the request."""
        assert sequence.finish_reason is None
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)
        self.runner.release(sequence.pages)
        request = sequence.request
        if all(s.finish_reason is not None for s in request.sequences):
            del self._requests[request.id]
