"""An engine over a model that counts, for the time of a function."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from lowlat.generate.model import Model
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.generation import Generation
from tests.fakes import ScriptedModel, byte_tokenizer, gqa_config


def counting_model(**options: Any) -> Model:
    """Every byte is followed by the next one, and the alphabet starts again after its end."""
    model = ScriptedModel(gqa_config(), lambda token: ord("a") if token >= 122 else token + 1)
    return Model(model, byte_tokenizer(), name="counting", **options)


def before_each_step(model: Model, action: Callable[[], object]) -> None:
    """From now on the engine's thread calls `action` before every step."""
    step = model.engine.step

    def acting() -> list[Any]:
        action()
        return step()

    model.engine.step = acting


def with_engine(
    use: Callable[[AsyncEngine], Awaitable[None]], model: Model | None = None, **options: Any
) -> Model:
    """Run `use` over a started engine and end it; returns the model, whose pages are all back."""
    model = model or counting_model()

    async def main() -> None:
        engine = AsyncEngine(model, **options)
        await engine.start()
        try:
            await use(engine)
        finally:
            await engine.drain(20.0)

    asyncio.run(main())
    return model


async def collect(generation: Generation) -> tuple[str, list[str | None]]:
    """All text of completion 0, and the finish reasons."""
    text, reasons = "", []
    async for delta in generation:
        text += delta.text if delta.index == 0 else ""
        if delta.finish_reason is not None:
            reasons.append(delta.finish_reason)
    return text, reasons


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come."""
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


def assert_nothing_is_left(model: Model) -> None:
    assert model.runner.allocator.num_used == 0 and not model.engine.has_work
    model.engine.check_integrity()
