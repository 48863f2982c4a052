"""Model failures in the engine: every failed completion ends, and no other is affected."""

from typing import Any

import pytest
import torch

from lowlat.config.model import ModelConfig
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import Chunk, RequestOptions
from lowlat.engine.runner import ModelRunner
from lowlat.generate.model import Model
from lowlat.utils.errors import UserError
from tests.fakes import ScriptedModel, byte_tokenizer, gqa_config, mla_config, tiny_model

from .test_engine import counting_engine, engine_for, run

POISON = 200


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model fail for prompts that contain POISON."""
    step = ModelRunner.step

    def broken(self: ModelRunner, chunks: list[Chunk]) -> Any:
        if any(POISON in chunk.tokens for chunk in chunks):
            raise RuntimeError("the model broke")
        return step(self, chunks)

    monkeypatch.setattr(ModelRunner, "step", broken)


def counting() -> Model:
    model = ScriptedModel(gqa_config(), lambda token: token + 1)
    return Model(model, byte_tokenizer(), name="counting")


@pytest.mark.parametrize("others", [0, 2])
def test_a_prompt_that_fails_ends_all_its_completions(
    monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """Regression: callers that wait forever for completions 1 to n - 1."""
    poison(monkeypatch)
    engine = counting_engine()
    good = [engine.add([number], TokenSamplingParams(max_tokens=3)) for number in range(others)]
    bad = engine.add([POISON], TokenSamplingParams(n=3, temperature=1.0))
    events = run(engine)
    for index in range(3):
        (event,) = events[bad.id, index]
        assert (event.token, event.finish_reason) == (None, "error")
        assert event.error == "the model failed: the model broke"
    assert [len(events[request.id, 0]) for request in good] == [3] * others
    assert engine.recorder.snapshot().finished.get("error") == 3


def test_a_deadline_missed_in_the_queue_ends_all_completions() -> None:
    engine = counting_engine()
    request = engine.add(
        [1], TokenSamplingParams(n=3, temperature=1.0), RequestOptions(deadline=0.0)
    )
    events = run(engine)
    assert [events[request.id, index][0].finish_reason for index in range(3)] == ["deadline"] * 3


def test_generate_raises_for_a_prompt_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a loop without end over an engine without work."""
    poison(monkeypatch)
    model = counting()
    for n in (1, 2):
        with pytest.raises(UserError, match="the model broke"):
            model.generate([POISON], n=n, temperature=1.0, max_tokens=3)
    assert model.generate([65], max_tokens=2) == "BC"


def test_waiting_for_an_engine_without_work_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = counting()
    stream = model.generate([65], stream=True, max_tokens=9)
    assert next(stream) == "B"
    model.engine.abort(0)
    with pytest.raises(RuntimeError, match="nothing left to do"):
        next(stream)


def test_sequences_that_fail_only_together_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: an engine that ends all requests if a step is too large, for example for
    memory."""
    step = ModelRunner.step

    def broken(self: ModelRunner, chunks: list[Chunk]) -> Any:
        if len(chunks) > 1:
            raise torch.OutOfMemoryError("too large")
        return step(self, chunks)

    def ask(engine: Engine) -> list[list[int | None]]:
        prompts = ([1, 2, 3], [50], [90, 91])
        requests = [engine.add(prompt, TokenSamplingParams(max_tokens=7)) for prompt in prompts]
        events = run(engine)
        return [[event.token for event in events[request.id, 0]] for request in requests]

    expected = ask(counting_engine())
    monkeypatch.setattr(ModelRunner, "step", broken)
    assert ask(counting_engine()) == expected


# Rows that are not finite

PROMPT = [(i * 37) % 200 for i in range(23)]


def plant_nan(monkeypatch: pytest.MonkeyPatch, engine: Engine, number: int) -> None:
    """Let step `number` of the engine compute with an embedding of NaN."""
    step, done = engine.runner.step, []

    def planted(chunks: list[Chunk]) -> Any:
        done.append(chunks)
        if len(done) != number:
            return step(chunks)
        weight = engine.runner.model.embed_tokens.weight
        row = weight.data[chunks[0].tokens[0]].clone()
        weight.data[chunks[0].tokens[0]] = float("nan")
        try:
            return step(chunks)
        finally:
            weight.data[chunks[0].tokens[0]] = row

    monkeypatch.setattr(engine.runner, "step", planted)


def tokens_of(engine: Engine, prompt: list[int]) -> list[int | None]:
    request = engine.add(prompt, TokenSamplingParams(max_tokens=9))
    return [event.token for event in run(engine)[request.id, 0]]


@pytest.mark.parametrize("config", [gqa_config(), mla_config()], ids=["gqa", "mla"])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_entries_of_a_failed_request_are_not_found(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, number: int
) -> None:
    """Regression: one NaN that ends every request with the same prefix, through the prefix
    cache."""
    options: dict[str, Any] = {"page_size": 4, "prefill_chunk": 8, "speculates": False}
    engine = engine_for(tiny_model(config), **options)
    expected = tokens_of(engine_for(engine.runner.model, **options), PROMPT)
    plant_nan(monkeypatch, engine, number)
    bad = engine.add(PROMPT, TokenSamplingParams(max_tokens=9))
    events = run(engine)[bad.id, 0]
    assert events[-1].finish_reason == "error" and len(events) == max(1, number - 2)
    good = engine.add(PROMPT, TokenSamplingParams(max_tokens=9))
    assert [event.token for event in run(engine)[good.id, 0]] == expected
    assert good.num_matched == 0


def test_a_request_that_waits_for_pages_of_a_failed_one_computes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: entries offered to other requests before they were checked for NaN."""
    options: dict[str, Any] = {"page_size": 4, "prefill_chunk": 8, "speculates": False}
    engine = engine_for(tiny_model(gqa_config()), **options)
    expected = tokens_of(engine_for(engine.runner.model, **options), PROMPT)
    plant_nan(monkeypatch, engine, 1)
    bad, good = (engine.add(PROMPT, TokenSamplingParams(max_tokens=9)) for _ in range(2))
    events = run(engine)
    assert [event.finish_reason for event in events[bad.id, 0]] == ["error"]
    assert [event.token for event in events[good.id, 0]] == expected


def test_an_entry_that_becomes_nan_in_the_cache_is_withdrawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was finite when it was computed, so other sequences share it by then."""
    options: dict[str, Any] = {"page_size": 4, "prefill_chunk": 8, "speculates": False}
    engine = engine_for(tiny_model(gqa_config()), **options)
    expected = tokens_of(engine, PROMPT)
    assert engine.prefix is not None
    known = len(engine.prefix)
    for rows in engine.runner.cache.layers:
        rows[0] = float("nan")
    assert tokens_of(engine, PROMPT)[-1] is None
    assert known > 0 and len(engine.prefix) == 0
    assert tokens_of(engine, PROMPT) == expected
