"""Between the event loop, which serves connections, and the one thread that runs the engine.

Owns that thread, the bounded way in, the deltas on their way out, cancellation, and knowing whether
the engine still advances. Everything the engine's thread does for a request, detokenising included,
may fail for that request alone.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowlat.engine.constraint import Constraint
from lowlat.engine.params import SamplingParams
from lowlat.engine.request import FinishReason, Request, RequestOptions, TokenEvent
from lowlat.engine.stats import EngineStats
from lowlat.generate.completion import CompletionBuilder
from lowlat.generate.model import Model
from lowlat.serve.generation import (
    Delta,
    Draining,
    EngineDead,
    Generation,
    Overloaded,
    end_of,
    ends_of,
)
from lowlat.serve.watchdog import LOOK_SECONDS, Pulse

logger = logging.getLogger(__name__)

MAX_QUEUE = 256
STALL_SECONDS = 4.0
"""An engine's thread that does not come round for so long is reported as not healthy, unless it is
in the model and computes; with the time between looks that is told within 5 s."""
JOIN_SECONDS = 5.0
IDLE_SECONDS = 1.0
"""After so long without work the engine checks that no page is lost."""


@dataclass(slots=True)
class _Live:
    """A request in the engine, on the engine's side."""

    generation: Generation
    request: Request
    builders: dict[int, CompletionBuilder]
    """Of the completions that have not ended."""


class AsyncEngine:
    """One model's engine in a thread of its own, for one event loop.

    At most `max_queue` requests wait for their first step.
    """

    def __init__(self, model: Model, *, max_queue: int = MAX_QUEUE) -> None:
        self.model = model
        self.max_queue = max_queue
        self._engine = model.engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="lowlat-engine", daemon=True)
        self._wake = threading.Condition()
        self._submitted: deque[Generation] = deque()
        self._cancelled: deque[Generation] = deque()
        self._live: dict[int, _Live] = {}
        self._ids: dict[Generation, int] = {}
        self._is_draining = False
        self._is_ending = False
        self._has_ended = False
        self._failure: str | None = None
        self._pulse = Pulse()
        self._is_checked = True
        self._open: dict[Generation, int] = {}
        """Completions that have not ended, as the event loop knows."""
        self._is_idle = asyncio.Event()

    # --- on the event loop ---------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine's thread."""
        self._loop = asyncio.get_running_loop()
        self._is_idle.set()
        self._thread.start()
        self._look()

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise the UserError that `submit` would, queuing nothing."""
        self._engine.check(prompt, params)

    def check_room(self, num_coming: int = 0) -> None:
        """Raise EngineDead, Draining or Overloaded where `submit` would, were `num_coming` more
        requests queued before.
        """
        if self._failure is not None:
            raise EngineDead(self._failure)
        if self._is_draining:
            raise Draining
        if self._num_queued() + num_coming >= self.max_queue:
            raise Overloaded(self._retry_after())

    async def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        grammar: Constraint | None = None,
        cache_namespace: bytes = b"",
        priority: int = 0,
        deadline: float | None = None,
        keep_special: frozenset[int] = frozenset(),
        stop_ids: frozenset[int] = frozenset(),
        begins_text: bool = True,
    ) -> Generation:
        """Queue a request. `deadline` is in seconds from now; `cache_namespace` says whose it is;
        `begins_text` as in RequestOptions.

        Special tokens in `keep_special` are part of the text, those in `stop_ids` end it. Raises
        UserError where the model cannot serve it, Overloaded, Draining and EngineDead.
        """
        self.check(prompt, params)
        self.check_room()
        options = RequestOptions(
            priority=priority,
            deadline=None if deadline is None else time.perf_counter() + deadline,
            cache_namespace=cache_namespace,
            stop_ids=stop_ids,
            grammar=grammar,
            begins_text=begins_text,
        )
        generation = Generation(prompt, params, options, keep_special, self.cancel)
        with self._wake:
            if self._has_ended:
                # Since it was asked for room; nobody would take what is queued now.
                raise Draining if self._failure is None else EngineDead(self._failure)
            self._submitted.append(generation)
            self._wake.notify()
        self._open[generation] = params.n
        self._is_idle.clear()
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request; one that has ended is left alone."""
        with self._wake:
            self._cancelled.append(generation)
            self._wake.notify()

    @property
    def stats(self) -> EngineStats:
        """What the engine has done and is doing."""
        scheduler, pool = self._engine.scheduler, self._engine.runner.allocator
        return self._engine.recorder.snapshot(
            queued=self._num_queued(),
            running=len(scheduler.running),
            preemptions=scheduler.num_preemptions,
            pages_total=scheduler.limits.max_pages or pool.num_pages,
            pages_used=pool.num_used,
            pages_cached=pool.num_cached,
            page_tokens=self._engine.runner.cache.page_size,
        )

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread runs and, where it has something to do, gets on with it."""
        if self._failure is not None or not self._thread.is_alive():
            return False
        return self._pulse.silence() < STALL_SECONDS

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    async def drain(self, seconds: float) -> None:
        """Take no more requests, wait up to `seconds` for those there are, end the rest and the
        thread."""
        self._is_draining = True
        if self._open and self._thread.is_alive():
            try:
                await asyncio.wait_for(self._is_idle.wait(), seconds)
            except TimeoutError:
                logger.warning("requests were cut off: not done after %g s", seconds)
        with self._wake:
            self._is_ending = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, JOIN_SECONDS)

    def cut_off(self) -> None:
        """End all requests now; whoever waits for them does not wait for the engine's step."""
        for generation in self._open:
            for _, delta in ends_of(generation, "abort", None):
                generation.put(delta)
        self._open.clear()
        self._is_idle.set()

    def _look(self) -> None:
        """Feel the pulse of the engine's thread, now and then again."""
        if self._loop is not None and self._thread.is_alive():
            self._pulse.look()
            self._loop.call_later(LOOK_SECONDS, self._look)

    def _num_queued(self) -> int:
        return len(self._submitted) + len(self._engine.scheduler.waiting)

    def _retry_after(self) -> int:
        """Seconds until the queue has moved on by one, as far as can be told."""
        stats = self.stats
        if stats.e2e.count == 0:
            return 1
        seconds = stats.e2e.sum / stats.e2e.count / max(1, stats.running)
        return min(60, max(1, math.ceil(seconds)))

    def _dispatch(self, deltas: list[tuple[Generation, Delta]]) -> None:
        for generation, delta in deltas:
            if generation not in self._open:
                continue  # it was cut off
            generation.put(delta)
            if delta.finish_reason is not None:
                self._open[generation] -= 1
                if self._open[generation] == 0:
                    del self._open[generation]
        if not self._open:
            self._is_idle.set()

    # --- on the engine's thread ----------------------------------------------------------------

    def _run(self) -> None:
        self._pulse.begin()
        try:
            while self._turn():
                pass
        except BaseException as error:
            # Whatever it was: nobody else would hear of it, and every client would wait for ever.
            self._failure = f"the engine ended by {type(error).__name__}"
            logger.critical("the engine has ended; restart the server", exc_info=True)
        finally:
            self._end_all()

    def _turn(self) -> bool:
        """Take what has come in and run one step; False when the thread is to end."""
        self._wait()
        self._pulse.beat()
        with self._wake:
            submitted, cancelled = list(self._submitted), list(self._cancelled)
            is_ending = self._is_ending
        deltas: list[tuple[Generation, Delta]] = []
        try:
            for generation in submitted:
                deltas += self._add(generation)
                self._submitted.popleft()
            deltas += self._cancel(cancelled)
            if not is_ending:
                for delta in self._step():
                    deltas.append(delta)
        finally:
            # Also when the engine ends in this turn: nobody else knows of these.
            self._post(deltas)
        return not is_ending

    def _wait(self) -> None:
        """Until there is something to do."""
        while not self._engine.has_work:
            with self._wake:
                if self._submitted or self._cancelled or self._is_ending:
                    return
                self._pulse.rest()
                if self._wake.wait(None if self._is_checked else IDLE_SECONDS):
                    return
            self._pulse.beat()
            self._engine.check_integrity()
            self._is_checked = True

    def _add(self, generation: Generation) -> list[tuple[Generation, Delta]]:
        """Hand a request to the engine; its ends, where that fails."""
        request = None
        try:
            request = self._engine.add(generation.prompt, generation.params, generation.options)
            builders = {
                index: CompletionBuilder(
                    self.model.tokenizer, request, index, keep_special=generation.keep_special
                )
                for index in range(generation.params.n)
            }
        except Exception as error:
            logger.exception("a request could not be started")
            if request is not None:
                self._engine.abort(request.id)
            return ends_of(generation, "error", f"the request could not be started: {error}")
        self._is_checked = False
        self._live[request.id] = _Live(generation, request, builders)
        self._ids[generation] = request.id
        return []

    def _cancel(self, generations: list[Generation]) -> list[tuple[Generation, Delta]]:
        deltas = []
        for generation in generations:
            self._cancelled.popleft()
            live = self._live.get(self._ids.get(generation, -1))
            if live is not None:
                self._engine.abort(live.request.id)
                deltas += self._end(live, "abort", None)
        return deltas

    def _step(self) -> Iterator[tuple[Generation, Delta]]:
        """Run one step; what completions gained by it, as it becomes known."""
        if not self._engine.has_work:
            return
        with self._pulse.in_the_model():
            events = self._engine.step()
        grouped: dict[tuple[int, int], list[TokenEvent]] = {}
        for event in events:
            grouped.setdefault((event.request_id, event.index), []).append(event)
        for (request_id, index), own in grouped.items():
            live = self._live.get(request_id)
            if live is not None and index in live.builders:
                yield from self._advance(live, index, own)

    def _advance(
        self, live: _Live, index: int, events: list[TokenEvent]
    ) -> list[tuple[Generation, Delta]]:
        """One completion's events of a step as a delta."""
        builder = live.builders[index]
        shown = (len(builder.pieces), len(builder.token_ids), builder.num_in_text)
        try:
            for event in events:
                if builder.finish_reason is None:
                    builder.push(event)
        except Exception as error:
            logger.exception("detokenising failed for request %d", live.request.id)
            self._engine.abort(live.request.id, "error")
            return self._end(live, "error", f"detokenising failed: {error}")
        if builder.finish_reason is not None:
            self._engine.stop(live.request.id, index)
        delta = Delta(
            index=index,
            text="".join(builder.pieces[shown[0] :]),
            tokens=tuple(builder.token_ids[shown[1] :]),
            logprobs=tuple(builder.logprobs[shown[2] : builder.num_in_text]),
            finish_reason=builder.finish_reason,
            error=builder.error,
            is_grammar_error=builder.is_grammar_error,
        )
        self._time(live, builder)
        if builder.finish_reason is not None:
            self._close(live, index)
        return [(live.generation, delta)]

    def _time(self, live: _Live, builder: CompletionBuilder) -> None:
        generation, usage = live.generation, builder.usage
        generation.cached_tokens = live.request.num_matched
        started = live.request.started_at
        if started is not None:
            generation.queue_seconds = started - live.request.arrived_at
        generation.prefill_seconds = usage.prefill_seconds
        generation.decode_seconds = max(generation.decode_seconds, usage.decode_seconds)

    def _end(
        self, live: _Live, reason: FinishReason, error: str | None
    ) -> list[tuple[Generation, Delta]]:
        """End all open completions of a request that the engine has let go."""
        indices = list(live.builders)
        for index in indices:
            self._close(live, index)
        return [(live.generation, end_of(index, reason, error)) for index in indices]

    def _close(self, live: _Live, index: int) -> None:
        del live.builders[index]
        if not live.builders:
            del self._live[live.request.id]
            del self._ids[live.generation]

    def _end_all(self) -> None:
        """Nobody is left waiting when the thread ends."""
        with self._wake:
            # From here on nothing more is queued.
            self._has_ended = True
            submitted = list(self._submitted)
            self._submitted.clear()
        reason = "abort" if self._failure is None else "error"
        lives = list(self._live.values())
        deltas = [ends for live in lives for ends in self._end(live, reason, self._failure)]
        for generation in submitted:
            deltas += ends_of(generation, reason, self._failure)
        self._post(deltas)
        if self._failure is None:
            for live in lives:
                self._engine.abort(live.request.id)

    def _post(self, deltas: list[tuple[Generation, Delta]]) -> None:
        if deltas and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, deltas)
