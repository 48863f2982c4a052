"""ModelRegistry: the models of a server by name; loads them on demand, unloads idle ones (LRU).

Loading runs in threads off the event loop. The weights and KV caches of all models stay within a
limit of memory. Used by the event loop only.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from lowlat.generate.model import Model
from lowlat.model.native import weight_bytes
from lowlat.serve.async_engine import JOIN_SECONDS, AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.daemon_thread import run_in_daemon_thread
from lowlat.serve.generation import Draining, EngineDead, ModelUnavailable, Overloaded
from lowlat.serve.http.logs import log
from lowlat.serve.load_progress import LoadProgress
from lowlat.serve.model_info import ModelInfo
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.validation import one_line
from lowlat.serve.served_model import LoadedModel, PreparedModel, ServedModel
from lowlat.serve.structured_outputs import MemoryBudget, StructuredOutputManager
from lowlat.utils.errors import UserError

RETRY_SECONDS = 5
"""Retry-After while a model loads, or while others hold the memory."""
POLL_SECONDS = 0.02


class ModelRegistry:
    """Models by name and alias. `acquire` loads one, `release` allows to unload it again.

    A name resolves to its model by `find`.
    """

    def __init__(self, models: Sequence[ServedModel], config: ServeConfig) -> None:
        self.models = tuple(models)
        self._config = config
        self._by_name = {name: model for model in models for name in model.names}
        self._grammars = MemoryBudget(config.max_grammar_bytes)
        self._loads: dict[ServedModel, asyncio.Task[LoadedModel]] = {}
        self._unloads: dict[ServedModel, asyncio.Task[None]] = {}
        self._waiting: set[ServedModel] = set()
        """Models that wait for memory."""
        self._changed = asyncio.Event()
        self._is_draining = False

    @classmethod
    def of_engine(cls, engine: AsyncEngine, config: ServeConfig) -> "ModelRegistry":
        """A registry of one model that is in memory and stays there."""
        registry = cls((), config)
        name = config.model_name or engine.model.name
        loaded = registry._loaded(engine)
        return cls([ServedModel.resident(name, loaded, aliases=config.model_aliases)], config)

    # --- names and states ----------------------------------------------------------------------

    def find(self, name: str) -> ServedModel:
        """The model of a name, of an alias or of an adapter's name. Raises RequestError 404 for
        other names."""
        model = self._by_name.get(name)
        if model is None:
            shown = [name for model in self.models for name in (model.name, *model.adapters)]
            names = ", ".join(f"'{name}'" for name in shown)
            raise RequestError(
                f"the model '{one_line(name, 80)}' does not exist; this server serves {names}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return model

    @property
    def names(self) -> tuple[str, ...]:
        """All names, aliases and names of adapters."""
        return tuple(self._by_name)

    def check_model(self, model: ServedModel) -> None:
        """Raise what `ServedModel.check_room` raises, unless `check_room` was about this model."""
        if len(self.models) > 1:
            model.check_room()

    def check_room(self, num_coming: int) -> None:
        """Raise the refusal of the first model if no model could take a request. A single model
        gets `num_coming` further ones before; of several, `check_model` counts them later."""
        first = num_coming if len(self.models) == 1 else 0
        _check_any(self.models, lambda model: model.check_room(first))

    def check_health(self) -> None:
        """Raise EngineDead if no model can serve: all engines have ended or hang."""
        _check_any(self.models, ServedModel.check_health)

    # --- requests ------------------------------------------------------------------------------

    async def acquire(self, model: ServedModel) -> LoadedModel:
        """The model in memory, where it stays until `release`. Concurrent callers share a load.

        Raises ModelUnavailable if it is not loaded within the config's load_seconds, if loading
        fails, or if other models hold the memory.
        """
        model.num_requests += 1
        try:
            if model.loaded is None or (model.has_crashed and model.prepare):
                return await self._wait_for_load(model)
            return model.loaded
        except BaseException:
            self.release(model)
            raise

    def release(self, model: ServedModel) -> None:
        """End the use that began with `acquire`."""
        model.num_requests -= 1
        model.last_used = time.monotonic()
        if model.num_requests == 0:
            self._notify()
            self._unload_later(model)

    async def start(self) -> None:
        """Start the engines of the models in memory."""
        for loaded in self._in_memory():
            await loaded.engine.start()

    async def drain(self, seconds: float) -> None:
        """End loading, let running requests finish for up to `seconds`, and end the engines."""
        self._is_draining = True
        for task in self._loads.values():
            task.cancel()
        await asyncio.gather(*(loaded.engine.drain(seconds) for loaded in self._in_memory()))
        if self._unloads:
            # Daemon threads: an engine that hangs does not keep the program from ending.
            await asyncio.wait(self._unloads.values(), timeout=JOIN_SECONDS)
        for model, task in self._unloads.items():
            if not task.done():
                log(logging.WARNING, "the engine has not ended", model=model.name)

    def cut_off(self) -> None:
        """End all requests for their clients at once."""
        for loaded in self._in_memory():
            loaded.engine.cut_off()

    def close(self) -> None:
        """Stop the threads."""
        for loaded in self._in_memory():
            loaded.close()

    def _in_memory(self) -> list[LoadedModel]:
        return [model.loaded for model in self.models if model.loaded is not None]

    # --- loading -------------------------------------------------------------------------------

    async def _wait_for_load(self, model: ServedModel) -> LoadedModel:
        if self._is_draining:
            raise Draining
        task = self._loads.get(model)
        if task is None:
            model.check_retry()
            task = self._loads[model] = asyncio.create_task(self._load(model))
            task.add_done_callback(lambda done: self._end_load(model, done))
        waiting = asyncio.timeout(self._config.load_seconds)
        try:
            async with waiting:
                return await asyncio.shield(task)
        except TimeoutError as error:
            if model in self._waiting:
                raise self._no_memory(model) from error
            raise ModelUnavailable(
                f"the model '{model.name}' is still loading ({_progress(model)}); try again later",
                code="model_loading",
                retry_after=RETRY_SECONDS,
            ) from error
        except asyncio.CancelledError:
            if task.cancelled() and self._is_draining:
                raise Draining from None
            raise

    def _end_load(self, model: ServedModel, task: asyncio.Task[LoadedModel]) -> None:
        del self._loads[model]
        model.is_loading = False
        if model.loaded is None:
            model.num_bytes = 0
        if not task.cancelled():
            task.exception()  # retrieved also if no request waits any more
        self._notify()
        self._unload_later(model)

    async def _load(self, model: ServedModel) -> LoadedModel:
        """Load a model. Raises ModelUnavailable."""
        model.progress = LoadProgress()
        if model.has_crashed:
            log(logging.ERROR, "loading again after a crash", model=model.name)
            self._start_unload(model)
        while model in self._unloads:
            await asyncio.shield(self._unloads[model])
        model.check_retry()
        model.is_loading = True
        began_at = time.monotonic()
        try:
            prepared = await self._prepare(model)
            await self._make_room(model, prepared.num_bytes)
            engine, model.info, num_bytes = await run_in_daemon_thread(
                lambda: _load_model(prepared, model)
            )
            loaded = self._loaded(engine)
        except ModelUnavailable:
            raise
        except Exception as error:
            traced = None if isinstance(error, UserError) else error
            log(logging.ERROR, "loading failed", error=traced, model=model.name, reason=str(error))
            model.fail("could not be loaded")
            raise model.unavailable() from error
        await loaded.engine.start()
        model.begin(loaded, num_bytes)
        seconds = round(time.monotonic() - began_at, 3)
        log(logging.INFO, "loaded", model=model.name, bytes=model.num_bytes, seconds=seconds)
        return loaded

    async def _prepare(self, model: ServedModel) -> PreparedModel:
        """The files of a model: fetched, converted and checked on first use."""
        if model.prepared is None:
            assert model.prepare is not None
            model.prepared = await run_in_daemon_thread(model.prepare, model.progress)
            model.info = model.prepared.info
        return model.prepared

    def _loaded(self, engine: AsyncEngine) -> LoadedModel:
        config = self._config
        manager = StructuredOutputManager(
            engine.model, max_waiting=config.max_waiting_grammars, budget=self._grammars
        )
        return LoadedModel(engine=engine, structured_outputs=manager)

    # --- memory --------------------------------------------------------------------------------

    async def _make_room(self, model: ServedModel, needed: int) -> None:
        """Reserve memory, unloading idle models, the least recently used first; waits for those
        with requests, as long as requests wait for this one. Raises ModelUnavailable."""
        most = self._config.memory_bytes
        if most is not None and needed > most:
            raise ModelUnavailable(
                f"the model '{model.name}' needs {_gib(needed)}, more than the limit of"
                f" {_gib(most)} (--memory)",
                code="insufficient_memory",
            )
        self._waiting.add(model)
        try:
            while most is not None and self._used_bytes() + needed > most:
                if model.num_requests == 0:
                    raise self._no_memory(model)
                for victim in self._victims(self._used_bytes() + needed - most):
                    log(logging.INFO, "unloading for another model", model=victim.name)
                    self._start_unload(victim)
                await self._changed.wait()
        finally:
            self._waiting.discard(model)
        model.num_bytes = needed

    def _used_bytes(self) -> int:
        return sum(model.num_bytes for model in self.models)

    def _victims(self, missing: int) -> list[ServedModel]:
        """Idle models whose unloading frees `missing` bytes, with those that unload already; none
        if it frees less."""
        missing -= sum(model.num_bytes for model in self._unloads)
        idle = [
            model
            for model in self.models
            if model.loaded is not None and model.num_requests == 0 and model.prepare is not None
        ]
        victims: list[ServedModel] = []
        for model in sorted(idle, key=lambda model: model.last_used):
            if missing <= 0:
                break
            victims.append(model)
            missing -= model.num_bytes
        return victims if missing <= 0 else []

    def _no_memory(self, model: ServedModel) -> ModelUnavailable:
        needed = 0 if model.prepared is None else model.prepared.num_bytes
        holders = ", ".join(
            f"'{other.name}' {_gib(other.num_bytes)} ({other.num_requests} requests)"
            for other in self.models
            if other.num_bytes
        )
        return ModelUnavailable(
            f"the model '{model.name}' needs {_gib(needed)}, and the memory is in use:"
            f" {holders}, of {_gib(self._config.memory_bytes or 0)}; try again later",
            code="insufficient_memory",
            retry_after=RETRY_SECONDS,
        )

    # --- unloading -----------------------------------------------------------------------------

    def _unload_later(self, model: ServedModel) -> None:
        """Unload an idle model after the config's unload_seconds, if it is not used until then."""
        seconds = self._config.unload_seconds
        if seconds is None or model.loaded is None or model.prepare is None:
            return
        if model.num_requests == 0 and model.unload_timer is None:
            left = model.last_used + seconds - time.monotonic()
            loop = asyncio.get_running_loop()
            model.unload_timer = loop.call_later(left, self._unload_if_idle, model, seconds)

    def _unload_if_idle(self, model: ServedModel, seconds: float) -> None:
        model.unload_timer = None
        if time.monotonic() < model.last_used + seconds:
            self._unload_later(model)  # it was used since, or the timer fired early
        elif model.loaded is not None and model.num_requests == 0 and not self._is_draining:
            log(logging.INFO, "unloading an idle model", model=model.name)
            self._start_unload(model)

    def _start_unload(self, model: ServedModel) -> None:
        if model.has_crashed:
            model.fail("crashed", is_crash=True)
        loaded = model.take_loaded()
        model.is_unloading = True
        model.num_unloads += 1
        task = self._unloads[model] = asyncio.create_task(_unload(loaded))
        task.add_done_callback(lambda _: self._end_unload(model))

    def _end_unload(self, model: ServedModel) -> None:
        del self._unloads[model]
        model.is_unloading = False
        model.num_bytes = 0
        self._notify()

    def _notify(self) -> None:
        """Wake what waits for memory."""
        self._changed.set()
        self._changed = asyncio.Event()


def num_bytes_of(model: Model) -> int:
    """Bytes of the weights, and of the KV cache when it is full."""
    cache = model.runner.cache
    pages = max(cache.num_pages, model.engine.scheduler.limits.max_pages or 0)
    return weight_bytes(model.transformer) + pages * cache.page_bytes


def _load_model(prepared: PreparedModel, served: ServedModel) -> tuple[AsyncEngine, ModelInfo, int]:
    """The engine, the facts and the bytes of a model that is loaded."""
    model = prepared.load(served.progress)
    engine = AsyncEngine(model, max_queue=served.max_queue)
    return engine, ModelInfo.of(model), num_bytes_of(model)


async def _unload(loaded: LoadedModel) -> None:
    await loaded.engine.drain(0.0)
    while loaded.engine.is_running:  # a long step
        await asyncio.sleep(POLL_SECONDS)
    await run_in_daemon_thread(loaded.free)


def _check_any(models: Sequence[ServedModel], check: Callable[[ServedModel], None]) -> None:
    """Raise what `check` raises for the first model, if it raises for all of them."""
    refusal: Exception | None = None
    for model in models:
        try:
            check(model)
            return
        except (EngineDead, Draining, Overloaded, ModelUnavailable) as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal


def _progress(model: ServedModel) -> str:
    return f"{model.progress.label or 'waiting'}, {100 * model.progress.fraction:.0f} %"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
