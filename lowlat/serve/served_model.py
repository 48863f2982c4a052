"""ServedModel: a model that a server offers by name, in memory or not; its state and failures.

`serve.model_registry` loads and unloads them. Used by the event loop only.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from lowlat.engine.stats import EngineStats
from lowlat.generate.model import Model
from lowlat.serve.async_engine import MAX_QUEUE, AsyncEngine
from lowlat.serve.generation import EngineDead, ModelUnavailable, Overloaded
from lowlat.serve.http.logs import log
from lowlat.serve.load_progress import LoadProgress
from lowlat.serve.model_info import ModelInfo
from lowlat.serve.structured_outputs import StructuredOutputManager
from lowlat.utils.progress import Progress

ModelState = Literal["unloaded", "loading", "ready", "unloading", "failed"]
STATES: tuple[ModelState, ...] = ("unloaded", "loading", "ready", "unloading", "failed")
MAX_RETRY_SECONDS = 300.0
"""Longest time after a failure in which a model is not loaded again."""
STABLE_SECONDS = 60.0
"""A model that served for this long before it failed is loaded again at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedModel:
    """A model whose files are on this machine and checked."""

    info: ModelInfo
    num_bytes: int
    """Memory to count for it: weights and KV cache."""
    load: Callable[[Progress], Model]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model in memory: its engine and its compiler of structured outputs."""

    engine: AsyncEngine
    structured_outputs: StructuredOutputManager

    @property
    def model(self) -> Model:
        return self.engine.model

    def close(self) -> None:
        """Stop the threads of structured outputs."""
        self.structured_outputs.close()

    def free(self) -> None:
        """Free the memory of weights and KV cache, after the engine has ended."""
        self.close()
        self.model.free()


@dataclass(eq=False, kw_only=True, slots=True)
class ServedModel:
    """A model by its name. Without `prepare` it stays in memory (`resident`)."""

    name: str
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    """Names of its LoRA adapters, which requests give instead of its own."""
    prepare: Callable[[Progress], PreparedModel] | None = None
    """Fetches and checks the files; blocks. Raises UserError."""
    prepared: PreparedModel | None = None
    max_queue: int = MAX_QUEUE
    loaded: LoadedModel | None = None
    info: ModelInfo | None = None
    num_bytes: int = 0
    """Memory that it has, or that is reserved for it while it loads or unloads."""
    num_requests: int = 0
    """Requests that use it or wait for it; it is not unloaded while there are some."""
    num_preparing: int = 0
    """Those of them not yet submitted to the engine."""
    last_used: float = 0.0
    """By time.monotonic."""
    unload_timer: asyncio.TimerHandle | None = None
    """Unloads it if it is idle."""
    is_loading: bool = False
    is_unloading: bool = False
    progress: LoadProgress = field(default_factory=LoadProgress)
    num_loads: int = 0
    num_unloads: int = 0
    num_load_failures: int = 0
    num_crashes: int = 0
    _failure: str | None = None
    """What happened last; None after loading."""
    _num_failures: int = 0
    """Consecutive failures."""
    _retry_at: float = 0.0
    _failed_at: float = 0.0
    _loaded_at: float = 0.0
    _last_stats: EngineStats | None = None

    @classmethod
    def resident(
        cls, name: str, loaded: LoadedModel, *, aliases: tuple[str, ...] = ()
    ) -> "ServedModel":
        """A model that is loaded before the server starts, and stays."""
        adapters = tuple(loaded.model.adapters.requests)
        info = ModelInfo.of(loaded.model)
        return cls(name=name, aliases=aliases, adapters=adapters, loaded=loaded, info=info)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases, *self.adapters)

    @property
    def state(self) -> ModelState:
        if self.is_unloading:
            return "unloading"
        if self.is_loading:
            return "loading"
        if self.loaded is not None:
            return "ready" if self.loaded.engine.is_healthy else "failed"
        return "unloaded" if self._failure is None else "failed"

    @property
    def has_crashed(self) -> bool:
        """Whether the engine in memory has ended by an error."""
        return self.loaded is not None and self.loaded.engine.has_failed

    @property
    def stats(self) -> EngineStats:
        """Those of the engine; after unloading the last ones, with gauges of 0."""
        if self.loaded is not None:
            return self.loaded.engine.stats
        return self._last_stats or EngineStats()

    def check_room(self, num_coming: int = 0) -> None:
        """Raise EngineDead, Draining, Overloaded or ModelUnavailable if one more request could not
        be served after `num_coming` further ones."""
        num_coming += self.num_preparing
        if self.loaded is not None and not (self.has_crashed and self.prepare):
            self.loaded.engine.check_room(num_coming)
        elif num_coming >= self.max_queue:
            raise Overloaded(retry_after=1)
        else:
            self.check_retry()

    def check_retry(self) -> None:
        """Raise ModelUnavailable if it has failed and may not be loaded again yet."""
        if self._failure is not None and time.monotonic() < self._retry_at:
            raise self.unavailable()

    def unavailable(self) -> ModelUnavailable:
        """The refusal of a model that has failed; the reason may name folders, and is logged."""
        left = max(1.0, self._retry_at - time.monotonic())
        return ModelUnavailable(
            f"the model '{self.name}' {self._failure}; see the server's log",
            code="model_failed",
            retry_after=left,
        )

    def check_health(self) -> None:
        """Raise EngineDead if the engine in memory has ended or hangs, and stays so."""
        if self.loaded is not None and not self.loaded.engine.is_healthy:
            if self.prepare is None or not self.has_crashed:
                raise EngineDead

    def warn_of_batches(self) -> None:
        """Log if tokens of the model in memory may depend on batch composition."""
        if self.loaded is not None and not self.loaded.model.runner.is_batch_invariant:
            text = "not batch-invariant: tokens may depend on batch composition"
            log(logging.WARNING, text, model=self.name)

    # --- for the registry ----------------------------------------------------------------------

    def begin(self, loaded: LoadedModel, num_bytes: int) -> None:
        """Record that it is in memory and takes `num_bytes`."""
        self.loaded, self.num_bytes = loaded, num_bytes
        self.num_loads += 1
        self._failure = None
        self._loaded_at = self.last_used = time.monotonic()
        self.warn_of_batches()

    def take_loaded(self) -> LoadedModel:
        """What is in memory, which from here on is no longer used."""
        assert self.loaded is not None
        loaded, self.loaded = self.loaded, None
        self._last_stats = replace(
            loaded.engine.stats, queued=0, running=0, pages_total=0, pages_used=0, pages_cached=0
        )
        return loaded

    def fail(self, reason: str, *, is_crash: bool = False) -> None:
        """Record a failure. The time until the next attempt doubles with each: 0, 1, 3, 7... s."""
        now = time.monotonic()
        if self._failed_at < self._loaded_at < now - STABLE_SECONDS:
            self._num_failures = 0
        self.num_crashes += is_crash
        self.num_load_failures += not is_crash
        self._failure, self._failed_at = reason, now
        self._retry_at = now + min(MAX_RETRY_SECONDS, 2.0**self._num_failures - 1.0)
        self._num_failures += 1
