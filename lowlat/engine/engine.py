"""Add requests, step, abort: the glue of scheduler, runner, sampler and drafts. Token ids only.

Owns the life of a request: validation against the model, forking into n completions, finish
reasons, timing, and keeping one request's fault from the others. One thread calls it.
"""

import logging
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from lowlat.engine.admission import check_request
from lowlat.engine.params import SamplingParams
from lowlat.engine.prefill_planner import PREFILL_CHUNK, PrefillPlanner
from lowlat.engine.prefix import PrefixCache
from lowlat.engine.request import Chunk, FinishReason, Request, RequestOptions, Sequence, TokenEvent
from lowlat.engine.runner import ModelRunner
from lowlat.engine.sampler import SampledToken, SequenceSampler, StepLogits
from lowlat.engine.scheduler import Limits, ScheduledChunk, Scheduler
from lowlat.engine.speculative import Speculator
from lowlat.engine.stats import Recorder
from lowlat.utils.errors import UserError

logger = logging.getLogger(__name__)

NOT_FINITE = (
    "the model's logits are not finite; load it with a dtype of larger range (bf16 or fp32), or "
    "check its weights"
)


class Engine:
    """Generates for any number of requests at once.

    `context` is the most tokens prompt and output may have together. What a request generates
    depends on the request alone: neither on what runs beside it, nor on the limits, the prefix
    cache or speculation. Without native kernels that is up to PyTorch's rounding, which depends on
    how many rows a step has.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        context: int,
        eos_ids: frozenset[int],
        limits: Limits | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        has_prefix_cache: bool = True,
        speculates: bool = True,
    ) -> None:
        limits = limits or Limits()
        page_size = runner.cache.page_size
        self.runner = runner
        self.context = context
        self.eos_ids = eos_ids
        self.recorder = Recorder()
        if limits.max_pages is not None:
            self.context = min(context, limits.max_pages * page_size)
        self.prefix = (
            PrefixCache(runner.allocator, page_size=page_size) if has_prefix_cache else None
        )
        attention = runner.model.config.attention
        self.scheduler = Scheduler(
            planner=PrefillPlanner(attention, chunk=prefill_chunk, page_size=page_size),
            allocator=runner.allocator,
            prefix=self.prefix,
            limits=limits,
        )
        self.speculator = Speculator(runner) if speculates else None
        self._requests: dict[int, Request] = {}
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(
        self,
        prompt: SequenceOf[int],
        params: SamplingParams,
        options: RequestOptions | None = None,
    ) -> Request:
        """Queue a request. Raises UserError, queuing nothing, where the model cannot serve it.

        The returned record is to be read only; it stays valid after the request has ended.
        """
        room = self.check(prompt, params)
        options = options or RequestOptions()
        if params.structured is not None and options.grammar is None:
            raise AssertionError("a structured output comes with its compiled grammar")
        request = Request(
            id=self._next_id,
            prompt=tuple(prompt),
            params=params,
            options=options,
            max_outputs=room if params.max_tokens is None else params.max_tokens,
            arrived_at=time.perf_counter(),
        )
        self._next_id += 1
        self._requests[request.id] = request
        request.sequences.append(self._new_sequence(request, 0))
        self.scheduler.add(request.sequences[0])
        return request

    def step(self) -> list[TokenEvent]:
        """Run the model once over what the scheduler chose; the events that came of it."""
        events = self._expire()
        work = self.scheduler.schedule()
        if not work:
            return events
        started = time.perf_counter()
        for item in work:
            self._start(item.sequence.request, started)
        outputs, failed = self._run(work)
        events += failed
        if outputs is None:
            return events
        ran = [item for item in work if item.sequence.finish_reason is None]
        events += self._sample(ran, *outputs)
        self._observe(ran, time.perf_counter() - started)
        return events

    def stop(self, request_id: int, index: int) -> None:
        """End one completion if it has not ended: the caller found a stop string in its text."""
        request = self._requests.get(request_id)
        if request is not None and request.sequences[index].finish_reason is None:
            self._finish(request.sequences[index], "stop")

    def abort(self, request_id: int, reason: FinishReason = "abort") -> None:
        """End what has not ended of a request; one that has ended is left alone."""
        request = self._requests.get(request_id)
        for sequence in list(request.sequences) if request else []:
            if sequence.finish_reason is None:
                self._finish(sequence, reason)

    def check_integrity(self) -> None:
        """Raise AssertionError unless exactly the pages of unfinished sequences are in use, and
        allocator and prefix cache agree."""
        sequences = [s for request in self._requests.values() for s in request.sequences]
        unfinished = [s for s in sequences if s.finish_reason is None]
        queued = [*self.scheduler.waiting, *self.scheduler.running]
        if any(s.pages for s in sequences if s.finish_reason is not None):
            raise AssertionError("a finished sequence holds pages")
        if {id(s) for s in queued} != {id(s) for s in unfinished}:
            raise AssertionError("the queues and the unfinished sequences disagree")
        holders = [s.pages for s in sequences]
        if self.prefix is not None:
            self.prefix.check_integrity(holders)
        else:
            self.runner.allocator.check_integrity(holders)

    def check(self, prompt: SequenceOf[int], params: SamplingParams) -> int:
        """Tokens the context leaves for output, at least 1. Raises UserError where the model cannot
        serve the request."""
        return check_request(
            prompt,
            params,
            context=self.context,
            vocab_size=self.runner.model.config.vocab_size,
            max_sequences=self.scheduler.limits.max_sequences,
        )

    # --- one step ------------------------------------------------------------------------------

    def _start(self, request: Request, now: float) -> None:
        if request.started_at is None:
            request.started_at = now
            self.recorder.started(request)

    def _expire(self) -> list[TokenEvent]:
        """End what has passed its deadline."""
        now = time.perf_counter()
        late = [
            request
            for request in self._requests.values()
            if request.options.deadline is not None and request.options.deadline <= now
        ]
        events = []
        for request in late:
            for sequence in list(request.sequences):
                if sequence.finish_reason is None:
                    events += self._end(sequence, "deadline")
        return events

    def _run(
        self, work: list[ScheduledChunk]
    ) -> tuple[tuple[Tensor, Tensor] | None, list[TokenEvent]]:
        """Logits and hidden states of the step, and the ends of sequences that the model failed
        on: where a step fails, each of its sequences is run alone, and who passes goes on.
        """
        try:
            return self.runner.step([self._chunk(item) for item in work]), []
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(work))
            if len(work) == 1:
                return None, self._fail(work[0].sequence, _model_fault(error))
        passed: list[tuple[Tensor, Tensor]] = []
        events: list[TokenEvent] = []
        for item in work:
            try:
                # StepLogits that are written twice get the same values twice.
                passed.append(self.runner.step([self._chunk(item)]))
            except Exception as error:
                events += self._fail(item.sequence, _model_fault(error))
        if not passed:
            return None, events
        # What each got alone is kept: run together they may fail again, which is nobody's fault.
        logits, hidden = zip(*passed, strict=True)
        return (torch.cat(logits), torch.cat(hidden)), events

    def _chunk(self, work: ScheduledChunk) -> Chunk:
        """The work as the runner wants it."""
        sequence = work.sequence
        start, end = work.start, work.start + work.length
        known = len(sequence.tokens)
        tokens = sequence.tokens[start:end]
        if end > known:
            tokens = tokens + sequence.draft_tokens[: end - known]
        return Chunk(
            tokens=tokens,
            start=start,
            pages=tuple(sequence.pages),
            num_logits=max(0, end - known + 1),
            path=work.path,
        )

    def _sample(
        self, work: list[ScheduledChunk], logits: Tensor, hidden: Tensor
    ) -> list[TokenEvent]:
        """Choose tokens for every sequence that has been read to its end."""
        rows = StepLogits(logits)
        events: list[TokenEvent] = []
        row = 0
        states = hidden.split([item.length for item in work])
        for item, own in zip(work, states, strict=True):
            sequence = item.sequence
            known = len(sequence.tokens)
            count = max(0, item.start + item.length - known + 1)
            # Of most rows that are read no logits are asked, and others may soon share them.
            if sequence.is_prefilling and not own.isfinite().all():
                events += self._fail_not_finite(sequence)
            elif count == 0:
                self.scheduler.advance(sequence, item.length)
            elif sequence.awaits_first_token:
                self.scheduler.advance(sequence, item.length)
                for member in self._fork(sequence):
                    events += self._verify(member, rows, row, 1)
            else:
                self.scheduler.advance(sequence, known - item.start)
                events += self._verify(sequence, rows, row, count)
            row += count
        if self.speculator is not None:
            self.speculator.propose(work, hidden)
        return events

    def _verify(
        self, sequence: Sequence, rows: StepLogits, first: int, count: int
    ) -> list[TokenEvent]:
        """Take tokens from `count` rows for as long as each is what was drafted after it.

        Every token is drawn from the model's own distribution with the sequence's own random
        numbers, draft or not: drafts decide how many tokens a step yields, never which.
        """
        drafts, events = sequence.draft_tokens, []
        sequence.draft_tokens = []
        for place in range(count):
            try:
                sampled = rows.sample(first + place, sequence.sampler)
                if sampled is None:
                    return [*events, *self._fail_not_finite(sequence)]
                event = self._advance(sequence, sampled)
            except Exception as error:
                # Only a grammar raises UserError here: it has turned out to be too much work.
                is_grammar_error = isinstance(error, UserError)
                if not is_grammar_error:
                    logger.exception("sampling failed for request %d", sequence.request.id)
                return [
                    *events,
                    *self._fail(sequence, _line(error), is_grammar_error=is_grammar_error),
                ]
            events.append(event)
            if sequence.finish_reason is not None or place == len(drafts):
                break
            if event.token != drafts[place]:
                break
            self.scheduler.advance(sequence, 1)
        self.recorder.verified(drafted=len(drafts), accepted=max(0, len(events) - 1))
        if self.speculator is not None and drafts:
            self.speculator.verified(sequence, len(drafts), len(events) - 1)
        return events

    def _fork(self, first: Sequence) -> list[Sequence]:
        """The completions that share `first`'s logits: n where the prompt was just read."""
        request = first.request
        others = [self._new_sequence(request, index) for index in range(1, request.params.n)]
        for page, copy in self.scheduler.fork(first, others):
            self.runner.copy_page(page, copy)
        request.sequences += others
        return [first, *others]

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        grammar = request.options.grammar
        sampler = SequenceSampler(
            request.params,
            request.prompt,
            index,
            self.runner.model.config.vocab_size,
            None if grammar is None else grammar.start(),
        )
        return Sequence(request=request, index=index, tokens=list(request.prompt), sampler=sampler)

    def _advance(self, sequence: Sequence, sampled: SampledToken) -> TokenEvent:
        """Append the chosen token and say whether the sequence ends with it."""
        request, token = sequence.request, sampled.token
        is_end = token in request.options.stop_ids or (
            token in self.eos_ids and not request.params.ignore_eos
        )
        if not is_end:
            sequence.sampler.record(token)
        sequence.tokens.append(token)
        self._time(sequence)
        grammar = sequence.sampler.grammar
        reason: FinishReason | None = None
        if is_end or (grammar is not None and grammar.is_done):
            reason = "stop"
        elif sequence.num_outputs == request.max_outputs:
            reason = "length"
        if reason is not None:
            self._finish(sequence, reason)
        event = TokenEvent(request.id, sequence.index, token, sampled.logprob, sampled.top, reason)
        return replace(event, is_text=False) if is_end else event

    def _time(self, sequence: Sequence) -> None:
        now = time.perf_counter()
        self.recorder.generated(sequence, now)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        sequence.last_token_at = now

    def _observe(self, work: list[ScheduledChunk], seconds: float) -> None:
        self.recorder.stepped()
        if self.speculator is not None and all(item.path == "decode" for item in work):
            self.speculator.stepped(sum(item.length for item in work), seconds)

    # --- ends ----------------------------------------------------------------------------------

    def _fail(
        self, sequence: Sequence, error: str, *, is_grammar_error: bool = False
    ) -> list[TokenEvent]:
        ends = self._end(sequence, "error")
        return [replace(end, error=error, is_grammar_error=is_grammar_error) for end in ends]

    def _fail_not_finite(self, sequence: Sequence) -> list[TokenEvent]:
        """End a sequence whose rows nobody may go on from."""
        self.scheduler.withdraw(sequence)
        return self._fail(sequence, NOT_FINITE)

    def _end(self, sequence: Sequence, reason: FinishReason) -> list[TokenEvent]:
        """End a sequence without a token; the ends of all completions that it stands for."""
        ends = [
            TokenEvent(sequence.request.id, index, None, finish_reason=reason)
            for index in _completions(sequence)
        ]
        self._finish(sequence, reason)
        return ends

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence and give its pages back; with its request's last, forget the request.

        The grammar goes at once: the records refer to each other, and would keep it for long.
        """
        if sequence.finish_reason is not None:
            raise AssertionError("a sequence has ended twice")
        sequence.finish_reason = reason
        sequence.sampler.grammar = None
        self.scheduler.remove(sequence)
        request = sequence.request
        is_last = all(s.finish_reason is not None for s in request.sequences)
        now = time.perf_counter()
        for _ in _completions(sequence):
            self.recorder.finished(sequence, now)
        if is_last:
            request.options = replace(request.options, grammar=None)
            del self._requests[request.id]


def _completions(sequence: Sequence) -> range:
    """Completions that a sequence stands for: all n of its request until the prompt is read."""
    request = sequence.request
    if len(request.sequences) < request.params.n:
        return range(request.params.n)
    return range(sequence.index, sequence.index + 1)


def _model_fault(error: Exception) -> str:
    return f"the model failed: {_line(error)}"


def _line(error: Exception) -> str:
    return " ".join(f"{error}".split())[:300] or type(error).__name__
