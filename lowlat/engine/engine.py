"""LLM engine over token ids: add requests, step, stop, abort. No text.

Owns the checks of a request, the flow of a step (schedule, run the model, sample, verify draft
tokens), forking a prompt into n completions, finish reasons, and failures, which end only their own
request. One thread calls it.
"""

import logging
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import Tensor

from lowlat.engine.cache_fingerprint import fingerprint_of
from lowlat.engine.disk_cache import DiskCache, DiskCacheOptions
from lowlat.engine.kv_transfer import KVReceiver
from lowlat.engine.model_step import StepOutput, num_logits, num_sampled, one_line, run_step
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.pooling import PoolingState
from lowlat.engine.prefill_planner import PREFILL_CHUNK, PrefillPlanner
from lowlat.engine.prefix import PrefixCache
from lowlat.engine.request import (
    FinishReason,
    PoolingMode,
    Request,
    RequestOptions,
    Sequence,
    TokenEvent,
)
from lowlat.engine.request_table import RequestTable
from lowlat.engine.runner import ModelRunner
from lowlat.engine.sampler import StepLogits
from lowlat.engine.scheduler import Limits, ScheduledChunk, Scheduler
from lowlat.engine.speculative import Speculator
from lowlat.engine.stats import StatsRecorder
from lowlat.utils.errors import ContextLengthError, UserError

logger = logging.getLogger(__name__)

NOT_FINITE = (
    "the model's logits are not finite; load it with a dtype of larger range (bf16 or fp32), or "
    "check its weights"
)

LOADS_INTERVAL = 64
"""Steps after which the loads of experts are read."""


class Engine:
    """Generates tokens for any number of requests at once (continuous batching).

    `context` is the most tokens that prompt and output may have together. The output of a request
    depends on the request alone: not on the batch composition (batch invariance), the limits, the
    prefix cache or speculative decoding. Without native kernels this holds up to PyTorch's
    rounding, which depends on the number of rows of a step.

    disk: also keep the prefix cache on disk. receiver: of prefill processes, which compute prompts
    of a page and more. Raises UserError if the folder cannot be used.
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
        disk: DiskCacheOptions | None = None,
        receiver: KVReceiver | None = None,
        speculates: bool = True,
    ) -> None:
        limits = limits or Limits()
        page_size = runner.cache.page_size
        self.runner = runner
        self.context = context
        self.eos_ids = eos_ids
        self.recorder = StatsRecorder()
        self.expert_loads: dict[int, SequenceOf[int]] = {}
        """Tokens of every routed expert by layer, LOADS_INTERVAL steps old at most."""
        if limits.max_pages is not None:
            self.context = min(context, limits.max_pages * page_size)
        allocator = runner.allocator
        self.prefix = PrefixCache(allocator, page_size=page_size) if has_prefix_cache else None
        self.disk: DiskCache | None = None
        if disk is not None and self.prefix is not None:
            fingerprint = fingerprint_of(runner, context=context, prefill_chunk=prefill_chunk)
            self.disk = DiskCache(disk, fingerprint=fingerprint, runner=runner, prefix=self.prefix)
        self._step_seconds = 0.0
        attention = runner.model.config.attention
        self.scheduler = Scheduler(
            planner=PrefillPlanner(attention, chunk=prefill_chunk, page_size=page_size),
            allocator=allocator,
            prefix=self.prefix,
            limits=limits,
            disk=self.disk,
            receiver=receiver,
        )
        self.connector = self.scheduler.kv_cache.connector
        self._kv_cache = self.scheduler.kv_cache
        self.speculator = Speculator(runner) if speculates else None
        vocab_size = runner.model.config.vocab_size
        self._pooling: WeakKeyDictionary[Sequence, PoolingState] = WeakKeyDictionary()
        self._requests = RequestTable(
            self.scheduler, self.recorder, vocab_size=vocab_size, eos_ids=eos_ids
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check(self, prompt: SequenceOf[int], params: TokenSamplingParams) -> int:
        """Output tokens that fit the context after `prompt`, at least 1. Raises UserError naming
        the exceeded limit and by how much it is exceeded."""
        vocab_size = self.runner.model.config.vocab_size
        max_sequences = self.scheduler.limits.max_sequences
        if len(prompt) == 0:
            raise UserError("the prompt is empty; give at least one token")
        max_output = self.context - len(prompt)
        if max_output < 1:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens and the context is {self.context}, of which "
                "one must be left for the answer; shorten the prompt",
                context=self.context,
                field="prompt",
            )
        # After the length check, so that a prompt of millions of ids costs nothing here.
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(f"the prompt has a token id outside the vocabulary of {vocab_size}")
        if params.max_tokens is not None and params.max_tokens > max_output:
            raise ContextLengthError(
                f"max_tokens {params.max_tokens} and a prompt of {len(prompt)} tokens exceed the "
                f"context of {self.context}; set max_tokens to at most {max_output} or leave it "
                "out",
                context=self.context,
                field="max_tokens",
            )
        if params.n > max_sequences:
            raise UserError(
                f"n {params.n} exceeds the {max_sequences} completions that may run at once; lower "
                "n"
            )
        self._check_ids(params, vocab_size)
        if params.min_tokens > max_output:
            raise UserError(
                f"min_tokens {params.min_tokens} exceeds the {max_output} tokens that fit the "
                "context; lower it"
            )
        return max_output

    def _check_ids(self, params: TokenSamplingParams, vocab_size: int) -> None:
        """Raise UserError for token ids outside the vocabulary, and if no token may follow."""
        allowed = params.allowed_token_ids or ()
        for name, ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", allowed),
        ):
            if ids and max(ids) >= vocab_size:
                raise UserError(
                    f"{name} names token {max(ids)}, outside the vocabulary of {vocab_size}"
                )
        ends = self.eos_ids.union(params.stop_token_ids)
        if params.min_tokens > 0 and allowed and ends.issuperset(allowed):
            raise UserError(
                "allowed_token_ids has only tokens that end the completion, which min_tokens "
                "forbids; allow others"
            )

    def add(
        self,
        prompt: SequenceOf[int],
        params: TokenSamplingParams,
        options: RequestOptions | None = None,
    ) -> Request:
        """Queue a request. Raises UserError, queuing nothing, if the model cannot serve it.

        The returned record is read-only for the caller; it stays valid after the request has ended.
        """
        max_output = self.check(prompt, params)
        if params.max_tokens is not None:
            max_output = params.max_tokens
        return self._requests.add(tuple(prompt), params, options or RequestOptions(), max_output)

    def step(self) -> list[TokenEvent]:
        """Run the model once over the chunks that the scheduler chose; returns the events of the
        step: sampled tokens and ends of completions."""
        events = self._expire()
        self.scheduler.load(self._step_seconds)
        chunks = self.scheduler.schedule()
        started = time.perf_counter()
        for sequence in self.connector.computing if self.connector is not None else ():
            self._requests.start(sequence.request, started)
        if not chunks:
            return events
        for chunk in chunks:
            self._requests.start(chunk.sequence.request, started)
        output, failed = run_step(self.runner, chunks)
        for sequence, error in failed:
            events += self._requests.fail(sequence, error)
        if output is None:
            return events
        events += self._sample(output)
        self._step_seconds = time.perf_counter() - started
        self._observe(output.chunks, self._step_seconds)
        if self.disk is not None:
            self.disk.copy_after_step(self._step_seconds)
        return events

    def refresh_weights(self) -> None:
        """Take over weights that were changed in place, and empty the prefix cache. No request may
        be unfinished."""
        assert not self.has_work and self.disk is None
        self.runner.refresh_weights()
        if self.prefix is not None:
            self.prefix.clear()

    def copy_pending(self) -> bool:
        """Without a step to run, hand pages of the prefix cache to the disk's writer, as many as it
        takes now; whether some are left. Does not wait for the disk."""
        return self.disk is not None and self.disk.copy_pending()

    def copy_all(self) -> None:
        """Hand all pages to the disk's writer; waits for the disk if they are many."""
        if self.disk is not None:
            self.disk.copy_all()

    def close(self) -> None:
        """Finish writing the prefix cache to disk. The engine cannot be used afterwards."""
        if self.disk is not None:
            self.disk.close()

    def stop(self, request_id: int, index: int) -> None:
        """End one completion that has not ended: the caller found a stop string in its text."""
        request = self._requests.get(request_id)
        if request is not None and request.sequences[index].finish_reason is None:
            self._requests.finish(request.sequences[index], "stop")

    def abort(self, request_id: int, reason: FinishReason = "abort") -> None:
        """End all unfinished completions of a request; no effect on an ended request."""
        request = self._requests.get(request_id)
        for sequence in list(request.sequences) if request else []:
            if sequence.finish_reason is None:
                self._requests.finish(sequence, reason)

    def check_integrity(self) -> None:
        """Raise AssertionError unless exactly the pages of unfinished sequences are in use, and
        page allocator and prefix cache agree."""
        sequences = self._requests.sequences()
        unfinished = [s for s in sequences if s.finish_reason is None]
        queued = [*self.scheduler.waiting, *self.scheduler.loading, *self.scheduler.running]
        if any(s.pages for s in sequences if s.finish_reason is not None):
            raise AssertionError("a finished sequence holds pages")
        if {id(s) for s in queued} != {id(s) for s in unfinished}:
            raise AssertionError("the queues and the unfinished sequences disagree")
        holders = [s.pages for s in sequences]
        if self.prefix is not None:
            self.prefix.check_integrity(holders)
        else:
            self.runner.allocator.check_integrity(holders)

    # --- one step ------------------------------------------------------------------------------

    def _expire(self) -> list[TokenEvent]:
        """End the requests whose deadline has passed."""
        now = time.perf_counter()
        events = []
        for request in self._requests.late(now):
            for sequence in list(request.sequences):
                if sequence.finish_reason is None:
                    events += self._requests.end(sequence, "deadline")
        return events

    def _sample(self, output: StepOutput) -> list[TokenEvent]:
        """Sample every sequence whose prompt is complete, then draft tokens for the next step."""
        rows = StepLogits(output.logits)
        events: list[TokenEvent] = []
        row = 0
        states = output.hidden.split([chunk.length for chunk in output.chunks])
        for chunk, hidden in zip(output.chunks, states, strict=True):
            count = num_logits(chunk)
            events += self._sample_chunk(chunk, hidden, rows, row, count)
            row += count
        if self.speculator is not None:
            self.speculator.propose(output.chunks, output.hidden)
        return events

    def _sample_chunk(
        self, chunk: ScheduledChunk, hidden: Tensor, rows: StepLogits, first: int, count: int
    ) -> list[TokenEvent]:
        """Sample one chunk's sequence from rows first .. first + count - 1."""
        sequence = chunk.sequence
        # Most prefill tokens have no logits to check, and other sequences may soon share their
        # entries through the prefix cache.
        if sequence.is_prefilling and not hidden.isfinite().all():
            return self._fail_not_finite(sequence)
        if sequence.request.options.pooling is not None:
            return self._pool(chunk, hidden, sequence.request.options.pooling)
        if sequence.request.needs_prompt_logprobs:
            self._score_prompt(chunk, rows, first)
            first, count = first + count - num_sampled(chunk), num_sampled(chunk)
        if count == 0:
            self._kv_cache.advance(sequence, chunk.length)
            return []
        if not sequence.awaits_first_token:
            self._kv_cache.advance(sequence, len(sequence.tokens) - chunk.start)
            return self._verify(sequence, rows, first, count)
        self._kv_cache.advance(sequence, chunk.length)
        events: list[TokenEvent] = []
        for member in self._fork(sequence):
            events += self._verify(member, rows, first, 1)
        return events

    def _pool(self, chunk: ScheduledChunk, hidden: Tensor, mode: PoolingMode) -> list[TokenEvent]:
        """Pool the hidden states of a chunk; the last one of the prompt ends the request."""
        sequence = chunk.sequence
        state = self._pooling.setdefault(sequence, PoolingState(mode))
        state.add(chunk.start, hidden)
        sequence.num_cached += chunk.length
        if sequence.num_pending > 0:
            return []
        (end,) = self._requests.end(sequence, "stop")
        return [replace(end, embedding=state.result())]

    def _score_prompt(self, chunk: ScheduledChunk, rows: StepLogits, first: int) -> None:
        """Record the log-probabilities of the prompt tokens that the rows of a chunk predict."""
        request = chunk.sequence.request
        targets = request.prompt[chunk.start + 1 : chunk.start + 1 + chunk.length]
        # A preempted sequence computes its prompt again from the start.
        request.prompt_logprobs.truncate(chunk.start)
        count = request.options.prompt_logprobs or 0
        request.prompt_logprobs.extend(rows.score(first, targets, count))

    def _verify(
        self, sequence: Sequence, rows: StepLogits, first: int, count: int
    ) -> list[TokenEvent]:
        """Verify draft tokens (speculative decoding): sample `count` rows in order until a token
        differs from its draft token.

        Acceptance is by exact match, not by rejection sampling. Every token is drawn from the
        model's own distribution with the sequence's own random numbers: draft tokens decide how
        many tokens a step yields, never which.
        """
        drafts, events = sequence.draft_tokens, []
        sequence.draft_tokens = []
        for place in range(count):
            try:
                sampled = rows.sample(first + place, self._requests.sampler(sequence))
                if sampled is None:
                    return [*events, *self._fail_not_finite(sequence)]
                event = self._requests.append(sequence, sampled)
            except Exception as error:
                # Only an output constraint raises UserError here: a limit of its grammar.
                is_grammar = isinstance(error, UserError)
                if not is_grammar:
                    logger.exception("sampling failed for request %d", sequence.request.id)
                message = one_line(error)
                failed = self._requests.fail(sequence, message, is_grammar_error=is_grammar)
                return [*events, *failed]
            events.append(event)
            if sequence.finish_reason is not None or place == len(drafts):
                break
            if event.token != drafts[place]:
                break
            self._kv_cache.advance(sequence, 1)
        self.recorder.verified(drafted=len(drafts), accepted=max(0, len(events) - 1))
        if self.speculator is not None and drafts:
            self.speculator.policy.verified(sequence, len(drafts), len(events) - 1)
        return events

    def _fork(self, first: Sequence) -> list[Sequence]:
        """The n completions of the request whose prompt `first` has just completed; all sample from
        the same logits."""
        others = self._requests.make_others(first)
        for page, copy in self.scheduler.fork(first, others):
            self.runner.copy_page(page, copy)
        first.request.sequences += others
        return [first, *others]

    def _fail_not_finite(self, sequence: Sequence) -> list[TokenEvent]:
        """End a sequence with NaN or infinite values; the prefix cache forgets its pages."""
        self._kv_cache.withdraw(sequence)
        return self._requests.fail(sequence, NOT_FINITE)

    def _observe(self, chunks: list[ScheduledChunk], seconds: float) -> None:
        steps = self.recorder.stepped()
        if self.runner.balances_experts and steps % LOADS_INTERVAL == 0:
            self.expert_loads = self.runner.expert_loads()
        if self.speculator is not None and all(chunk.path == "decode" for chunk in chunks):
            self.speculator.stepped(sum(chunk.length for chunk in chunks), seconds)
