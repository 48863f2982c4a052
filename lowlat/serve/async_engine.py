"""Async engine: runs a model's engine in its own thread for the event loop of an HTTP server.

Owns the thread, the bounded queue of requests (backpressure: 429), the deltas on their way to the
event loop, cancellation, draining, and health. `generate.session` turns requests into text; its
failures end single requests.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from lowlat.config.attention import sparse_topk
from lowlat.engine.constraint import Constraint
from lowlat.engine.request import FinishReason, LoRARequest, PoolingMode, RequestOptions
from lowlat.engine.stats import EngineStats
from lowlat.generate.completion import CompletionDelta
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.generate.session import TextRequest
from lowlat.model.native import indexer_obstacle
from lowlat.serve.generation import Draining, EngineDead, Generation, Overloaded, ends_of
from lowlat.serve.watchdog import CHECK_SECONDS, Watchdog
from lowlat.utils.errors import UserError

logger = logging.getLogger(__name__)

MAX_QUEUE = 256
STALL_SECONDS = 4.0
"""The server reports itself unhealthy if the engine's thread sends no heartbeat for this long,
unless it computes inside the model; with the time between two checks that is within 5 s."""
JOIN_SECONDS = 5.0
IDLE_SECONDS = 1.0
"""After this long without work the engine checks that no page is lost."""
COPY_SECONDS = 0.02
"""Time between attempts to hand pages to a busy writer of the prefix cache on disk."""

Deltas = list[tuple[Generation, CompletionDelta]]


def check_batch_invariant(model: Model) -> None:
    """Raise UserError for a model whose sparse attention has no native kernels. In PyTorch, which
    tokens a request attends to could depend on the batch."""
    topk = sparse_topk(model.config.attention)
    if topk is None or model.runner.is_batch_invariant:
        return
    obstacle = indexer_obstacle(model.config.attention)
    remedy = "serve it on the CPU in bf16 or quantized, or" if obstacle is None else "serve it"
    reason = "" if obstacle is None else f", which cannot run this model: {obstacle}"
    raise UserError(
        f"{model.name}: sparse attention over more than its top-k of {topk} tokens is served by"
        f" native kernels only{reason}; {remedy} with --max-context {topk} or less"
    )


class AsyncEngine:
    """One model's engine in its own thread, for one event loop.

    At most `max_queue` requests wait for their first step. There is no rate limit per client.
    Raises UserError for a model with sparse attention that has no native kernels.
    """

    def __init__(self, model: Model, *, max_queue: int = MAX_QUEUE) -> None:
        check_batch_invariant(model)
        self.model = model
        self.max_queue = max_queue
        self._engine = model.engine
        self._session = model.session
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="lowlat-engine", daemon=True)
        self._wake = threading.Condition()
        self._submitted: deque[Generation] = deque()
        self._cancelled: deque[Generation] = deque()
        self._generations: dict[TextRequest, Generation] = {}
        """Unfinished requests in the engine; used by the engine's thread."""
        self._is_draining = False
        self._is_ending = False
        self._has_ended = False
        self._failure: str | None = None
        self._watchdog = Watchdog()
        self._is_checked = True
        self._open: dict[Generation, int] = {}
        """Number of unfinished completions; used by the event loop."""
        self._is_idle = asyncio.Event()

    # --- on the event loop ---------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_idle.set()
        self.model.watch(self._fail)
        self._thread.start()
        self._check_heartbeat()

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise the UserError that `submit` would raise; queues nothing."""
        self._engine.check(prompt, params)

    def check_room(self, num_coming: int = 0) -> None:
        """Raise the EngineDead, Draining or Overloaded that `submit` would raise after `num_coming`
        further requests.
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
        prompt_logprobs: int | None = None,
        keep_special: frozenset[int] = frozenset(),
        begins_text: bool = True,
        pooling: PoolingMode | None = None,
        lora: LoRARequest | None = None,
    ) -> Generation:
        """Queue a request. deadline: seconds from now. cache_namespace, prompt_logprobs, pooling
        and lora: see RequestOptions. keep_special, begins_text: see CompletionBuilder.

        Raises UserError if the model cannot serve the request, Overloaded, Draining and EngineDead.
        """
        self.check(prompt, params)
        self.check_room()
        options = RequestOptions(
            priority=priority,
            deadline=None if deadline is None else time.perf_counter() + deadline,
            cache_namespace=cache_namespace,
            constraint=grammar,
            pooling=pooling,
            prompt_logprobs=prompt_logprobs,
            lora=lora,
        )
        generation = Generation(
            prompt,
            params,
            options,
            keep_special=keep_special,
            begins_text=begins_text,
            cancel=self.cancel,
        )
        with self._wake:
            if self._has_ended:
                # The engine's thread has ended since check_room.
                raise Draining if self._failure is None else EngineDead(self._failure)
            self._submitted.append(generation)
            self._wake.notify()
        self._open[generation] = params.n
        self._is_idle.clear()
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request; no effect on an ended one."""
        with self._wake:
            self._cancelled.append(generation)
            self._wake.notify()

    @property
    def stats(self) -> EngineStats:
        """Counters, gauges and histograms of the engine."""
        scheduler, pool = self._engine.scheduler, self._engine.runner.allocator
        connector = self._engine.connector
        return self._engine.recorder.snapshot(
            queued=self._num_queued(),
            running=len(scheduler.running) + scheduler.num_loading(has_started=True),
            preemptions=scheduler.num_preemptions,
            expert_loads=self._engine.expert_loads,
            disk=None if self._engine.disk is None else self._engine.disk.recorder.snapshot(),
            transfer=None if connector is None else connector.recorder.snapshot(),
            pages_total=scheduler.limits.max_pages or pool.num_pages,
            pages_used=pool.num_used,
            pages_cached=pool.num_cached,
        )

    @property
    def has_failed(self) -> bool:
        """Whether the engine's thread has ended by an error."""
        return self._failure is not None

    @property
    def is_running(self) -> bool:
        """Whether the engine's thread has not ended."""
        return self._thread.is_alive()

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread is alive and, if it has work, advances."""
        if self._failure is not None or not self._thread.is_alive():
            return False
        return self._watchdog.silence() < STALL_SECONDS

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, wait up to `seconds` for the unfinished ones, abort the rest and end
        the thread."""
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

    def cut_off(self, reason: FinishReason = "abort", error: str | None = None) -> None:
        """End all requests for their clients at once, without waiting for the engine's step."""
        for generation in self._open:
            for _, delta in ends_of(generation, reason, error):
                generation.put(delta)
        self._open.clear()
        self._is_idle.set()

    def _fail(self, reason: str) -> None:
        """End all requests with an error: the runner is lost, and the engine's thread may wait for
        it forever. Called by another thread."""
        logger.critical("%s; the server ends", reason)
        self._failure = self._failure or f"the engine ended: {reason}"
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.cut_off, "error", self._failure)

    def _check_heartbeat(self) -> None:
        """Check the engine's thread now and every CHECK_SECONDS."""
        if self._loop is not None and self._thread.is_alive():
            self._watchdog.check()
            self._loop.call_later(CHECK_SECONDS, self._check_heartbeat)

    def _num_queued(self) -> int:
        """Requests that wait for their first step."""
        scheduler = self._engine.scheduler
        num_loading = scheduler.num_loading(has_started=False)
        return len(self._submitted) + len(scheduler.waiting) + num_loading

    def _retry_after(self) -> int:
        """Estimated seconds until the queue has one request less."""
        stats = self.stats
        if stats.e2e.count == 0:
            return 1
        seconds = stats.e2e.sum / stats.e2e.count / max(1, stats.running)
        return min(60, max(1, math.ceil(seconds)))

    def _dispatch(self, deltas: Deltas) -> None:
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
        """The engine's thread: rounds of taking requests and one step each."""
        self._watchdog.begin()
        try:
            while self._run_round():
                pass
        except BaseException as error:
            # No other code catches it, and every client would wait forever.
            self._failure = f"the engine ended by {type(error).__name__}"
            self.model.lose(self._failure)
            logger.critical("the engine has ended; restart the server", exc_info=True)
        finally:
            self._end_all()
            if self._failure is None:
                self._engine.close()

    def _run_round(self) -> bool:
        """Take new and cancelled requests and run one step; False when the thread is to end."""
        self._wait()
        self._watchdog.beat()
        with self._wake:
            submitted, cancelled = list(self._submitted), list(self._cancelled)
            is_ending = self._is_ending
        deltas: Deltas = []
        try:
            for generation in submitted:
                deltas += self._add(generation)
                self._submitted.popleft()
            deltas += self._cancel(cancelled)
            if not is_ending:
                for delta in self._step():
                    deltas.append(delta)
        finally:
            # Also when the engine ends in this round: nothing else holds these deltas.
            self._post(deltas)
        return not is_ending

    def _wait(self) -> None:
        while not self._engine.has_work:
            is_copying = self._engine.copy_pending()
            with self._wake:
                if self._submitted or self._cancelled or self._is_ending:
                    return
                self._watchdog.rest()
                seconds = None if self._is_checked else IDLE_SECONDS
                if self._wake.wait(COPY_SECONDS if is_copying else seconds):
                    return
            self._watchdog.beat()
            if is_copying:
                continue
            self._engine.check_integrity()
            self._is_checked = True

    def _add(self, generation: Generation) -> Deltas:
        """Add a request to the session; returns its ends if that fails."""
        try:
            generation.request = self._session.add(
                generation.prompt,
                generation.params,
                generation.options,
                keep_special=generation.keep_special,
                begins_text=generation.begins_text,
            )
        except Exception as error:
            logger.exception("a request could not be started")
            return ends_of(generation, "error", f"the request could not be started: {error}")
        self._is_checked = False
        self._generations[generation.request] = generation
        return []

    def _cancel(self, generations: list[Generation]) -> Deltas:
        """Abort cancelled requests, such as those of disconnected clients. The engine itself ends
        requests past their deadline.
        """
        deltas: Deltas = []
        for generation in generations:
            self._cancelled.popleft()
            request = generation.request
            if request is not None and request in self._generations:
                ends = self._session.abort(request)
                deltas += [(generation, end) for end in ends]
                del self._generations[request]
        return deltas

    def _step(self) -> Iterator[tuple[Generation, CompletionDelta]]:
        """Run one step; yields what each completion gained."""
        if not self._engine.has_work:
            return
        with self._watchdog.in_the_model():
            events = self._engine.step()
        finished: list[TextRequest] = []
        for request, delta in self._session.deliver(events):
            generation = self._generations[request]
            yield generation, delta
            _record_times(generation, request, delta.index)
            if delta.finish_reason is not None and request.is_finished:
                finished.append(request)
        for request in finished:
            # Several completions may have ended at once.
            self._generations.pop(request, None)

    def _end_all(self) -> None:
        """End all requests when the thread ends, so that no client waits."""
        with self._wake:
            # From here on nothing more is queued.
            self._has_ended = True
            submitted = list(self._submitted)
            self._submitted.clear()
        reason = "abort" if self._failure is None else "error"
        deltas: Deltas = []
        unfinished = list(self._generations.items())
        for request, generation in unfinished:
            ends = self._session.end(request, reason, self._failure)
            deltas += [(generation, end) for end in ends]
        self._generations.clear()
        for generation in submitted:
            deltas += ends_of(generation, reason, self._failure)
        self._post(deltas)
        if self._failure is None:
            for request, _ in unfinished:
                self._engine.abort(request.request.id)

    def _post(self, deltas: Deltas) -> None:
        """Have the event loop dispatch `deltas`."""
        if deltas and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, deltas)


def _record_times(generation: Generation, request: TextRequest, index: int) -> None:
    usage = request.builders[index].usage
    generation.cached_tokens = usage.cached_tokens
    generation.prompt_logprobs = request.request.prompt_logprobs
    generation.prefill_seconds = usage.prefill_seconds
    generation.decode_seconds = max(generation.decode_seconds, usage.decode_seconds)
