"""The engine over small models: what comes out, and that nothing is lost whatever happens."""

import asyncio
import random
import threading
import time
from pathlib import Path

import pytest

from lowlat.generate.grammar import GrammarCompiler
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.generate.session import GenerationSession
from lowlat.generate.structured import Choice
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.generation import Draining, Overloaded
from lowlat.utils.errors import UserError
from tests.fakes import EOS, ScriptedModel, byte_tokenizer, gqa_config
from tests.unit.engine.apart_engines import apart

from .engine_use import (
    assert_nothing_is_left,
    before_each_step,
    collect,
    counting_model,
    until,
    with_engine,
)

# What comes out


def test_deltas_are_the_completion() -> None:
    async def use(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=20, logprobs=1)
        generation = await engine.submit(b"abc", params)
        deltas = [delta async for delta in generation]
        assert "".join(delta.text for delta in deltas) == "defghijklmnopqrstuvw"
        tokens = [token for delta in deltas for token in delta.tokens]
        logprobs = [entry.token for delta in deltas for entry in delta.logprobs]
        assert bytes(tokens) == b"defghijklmnopqrstuvw" and logprobs == tokens
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
        assert generation.prompt_tokens == 3 and generation.decode_seconds > 0

    assert_nothing_is_left(with_engine(use))


def test_stop_strings_end_a_completion() -> None:
    async def use(engine: AsyncEngine) -> None:
        stopped = await engine.submit(b"abc", SamplingParams(stop=("hi",)))
        assert await collect(stopped) == ("defg", ["stop"])

    assert_nothing_is_left(with_engine(use))


def test_log_probabilities_are_those_of_the_text() -> None:
    """Regression: entries for the end of sequence and for a stop string."""
    model = ScriptedModel(gqa_config(), lambda token: token + 1 if token < 104 else EOS)

    async def use(engine: AsyncEngine) -> None:
        for stop, text in (((), b"defgh"), (("fg",), b"de")):
            generation = await engine.submit(b"abc", SamplingParams(logprobs=0, stop=stop))
            deltas = [delta async for delta in generation]
            entries = [entry for delta in deltas for entry in delta.logprobs]
            assert bytes(entry.token for entry in entries) == text
            assert [entry.start for entry in entries] == list(range(len(text)))
            assert "".join(delta.text for delta in deltas) == text.decode()

    with_engine(use, Model(model, byte_tokenizer(), name="ends"))


def test_special_tokens_are_text_if_requested() -> None:
    model = ScriptedModel(gqa_config(), lambda token: {97: 258, 258: 98}.get(token, EOS))
    for keep, text in ((frozenset(), "b"), (frozenset({258}), "<user>b")):

        async def use(engine: AsyncEngine, keep: frozenset[int] = keep, text: str = text) -> None:
            generation = await engine.submit(b"a", SamplingParams(), keep_special=keep)
            assert await collect(generation) == (text, ["stop"])

        with_engine(use, Model(model, byte_tokenizer(), name="special"))


def test_a_prompt_read_before_is_found() -> None:
    async def use(engine: AsyncEngine) -> None:
        prompt = bytes(range(80))
        for cached, cache_namespace in ((0, b"one"), (64, b"one"), (0, b"two")):
            generation = await engine.submit(
                prompt, SamplingParams(max_tokens=2), cache_namespace=cache_namespace
            )
            await collect(generation)
            assert generation.cached_tokens == cached
        assert engine.stats.cached_prompt_tokens == 64

    assert_nothing_is_left(with_engine(use))


def test_requests_that_cannot_be_served_are_refused_at_once() -> None:
    async def use(engine: AsyncEngine) -> None:
        with pytest.raises(UserError, match="context of 97"):
            await engine.submit(b"abc", SamplingParams(max_tokens=95))

    assert_nothing_is_left(with_engine(use))


def test_a_deadline_ends_what_runs() -> None:
    async def use(engine: AsyncEngine) -> None:
        generation = await engine.submit(b"abc", SamplingParams(ignore_eos=True), deadline=0.0)
        assert (await collect(generation))[1] == ["deadline"]

    assert_nothing_is_left(with_engine(use))


# Too much


def test_a_full_queue_refuses_and_who_was_admitted_is_served() -> None:
    """Regression: requests without bound, each taking memory and time from the others."""
    released = threading.Event()
    model = counting_model()
    before_each_step(model, released.wait)

    async def use(engine: AsyncEngine) -> None:
        admitted = [
            await engine.submit(b"abc", SamplingParams(max_tokens=3, n=1)) for _ in range(5)
        ]
        for _ in range(50):
            with pytest.raises(Overloaded) as refused:
                await engine.submit(b"abc", SamplingParams(max_tokens=3))
            assert 1 <= refused.value.retry_after <= 60
        released.set()
        assert [await collect(one) for one in admitted] == [("def", ["length"])] * 5
        again = await engine.submit(b"abc", SamplingParams(max_tokens=3))
        assert await collect(again) == ("def", ["length"])

    assert_nothing_is_left(with_engine(use, model, max_queue=5))


def test_prompts_in_remote_prefill_leave_the_queue() -> None:
    permits, model = threading.Semaphore(0), counting_model()
    with apart(model.transformer, permits=permits) as pair:
        model.engine, model.runner = pair.decode, pair.decode.runner
        model.session = GenerationSession(pair.decode, byte_tokenizer())

        async def use(engine: AsyncEngine) -> None:
            generations = []
            for count in range(1, 4):
                prompt = bytes([count]) + b"abc" * 9
                generations.append(await engine.submit(prompt, SamplingParams(max_tokens=3)))
                await until(lambda count=count: engine.stats.running == count)
                assert engine.stats.queued == 0
            permits.release(1000)
            assert [await collect(one) for one in generations] == [("def", ["length"])] * 3

        assert_nothing_is_left(with_engine(use, model, max_queue=1))


@pytest.mark.slow
@pytest.mark.parametrize("has_grammar", [False, True])
def test_thousands_of_disconnects_leave_nothing_behind(has_grammar: bool) -> None:
    """Clients that leave before, while and after their request runs; prompts and n of all sizes."""
    rng = random.Random(3)
    model = counting_model(max_cache_bytes=6000 * 64)
    grammar = None
    if has_grammar:
        compiler = GrammarCompiler(model.tokenizer, vocab_size=model.config.vocab_size)
        grammar = compiler.compile(Choice(options=("yes", "no", "maybe")))

    async def client(engine: AsyncEngine) -> None:
        greedy = rng.random() < 0.5
        params = SamplingParams(
            max_tokens=rng.randint(1, 12),
            temperature=0.0 if greedy else 1.0,
            n=1 if greedy else rng.randint(1, 3),
        )
        prompt = bytes(rng.randrange(97, 122) for _ in range(rng.choice([1, 5, 70])))
        generation = await engine.submit(prompt, params, grammar=grammar)
        patience = rng.choice([0, 0, 1, 2, 5, 50])
        if patience:
            async for _ in generation:
                patience -= 1
                if patience == 0:
                    break
        await asyncio.sleep(rng.choice([0.0, 0.0, 0.001]))
        generation.cancel()

    async def use(engine: AsyncEngine) -> None:
        num_left = 1000 if has_grammar else 3000

        async def clients() -> None:
            nonlocal num_left
            while num_left > 0:
                num_left -= 1
                await client(engine)

        await asyncio.gather(*(clients() for _ in range(40)))
        await until(lambda: not model.engine.has_work)
        assert model.runner.allocator.num_used == 0
        assert not engine._generations and not engine._open

    assert_nothing_is_left(with_engine(use, model))


def test_a_storm_of_cancels_gives_all_pages_back_within_two_steps() -> None:
    model = counting_model()
    steps: list[float] = []
    before_each_step(model, lambda: steps.append(time.monotonic()))

    async def use(engine: AsyncEngine) -> None:
        params = SamplingParams(ignore_eos=True)
        generations = [await engine.submit(b"abc", params) for _ in range(1000)]
        await until(lambda: engine.stats.running >= 100)
        before = len(steps)
        for generation in generations:
            generation.cancel()
        await until(lambda: model.runner.allocator.num_used == 0 and not model.engine.has_work)
        assert len(steps) <= before + 2
        reasons = [(await collect(generation))[1] for generation in generations]
        assert all(reason in (["abort"], ["length"]) for reason in reasons)

    assert_nothing_is_left(with_engine(use, model, max_queue=1000))


# The end


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    model = counting_model()

    async def main() -> None:
        engine = AsyncEngine(model)
        await engine.start()
        running = await engine.submit(b"abc", SamplingParams(max_tokens=40))
        draining = asyncio.create_task(engine.drain(60.0))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await engine.submit(b"abc", SamplingParams())
        assert len((await collect(running))[0]) == 40
        await draining

    asyncio.run(main())
    assert_nothing_is_left(model)


def test_who_is_cut_off_does_not_wait_for_the_engine() -> None:
    """Regression: a second signal that takes as long as a step of the model."""
    model = counting_model()
    may_go = threading.Event()
    before_each_step(model, may_go.wait)

    async def use(engine: AsyncEngine) -> None:
        running = await engine.submit(b"abc", SamplingParams(max_tokens=3, n=2, temperature=1.0))
        draining = asyncio.create_task(engine.drain(3600.0))
        await asyncio.sleep(0)
        engine.cut_off()
        assert await collect(running) == ("", ["abort", "abort"])
        may_go.set()
        await draining

    assert_nothing_is_left(with_engine(use, model))


def test_what_does_not_end_in_time_is_cut_off() -> None:
    model = counting_model()
    before_each_step(model, lambda: time.sleep(0.01))

    async def main() -> None:
        engine = AsyncEngine(model)
        await engine.start()
        running = await engine.submit(b"abc", SamplingParams(ignore_eos=True))
        await engine.drain(0.0)
        assert (await collect(running))[1] == ["abort"]

    asyncio.run(main())
    assert_nothing_is_left(model)


def test_a_prefix_cache_on_disk_is_written_while_the_engine_is_idle_and_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that find no free buffer in the last step are written all the same."""
    monkeypatch.setattr("lowlat.engine.page_writer.BUFFER_BYTES", 0)
    prompt = bytes(range(97, 123)) * 20

    def files() -> list[Path]:
        return [path for path in tmp_path.glob("*/*/*") if len(path.name) == 64]

    config = gqa_config(max_position_embeddings=999)
    counting = ScriptedModel(config, lambda token: ord("a") if token >= 122 else token + 1)

    def model() -> Model:
        return Model(counting, byte_tokenizer(), name="counting", prefix_cache_dir=tmp_path)

    async def use(engine: AsyncEngine) -> None:
        await collect(await engine.submit(prompt, SamplingParams(max_tokens=2)))
        await until(lambda: len(files()) == 8)

    async def leave(engine: AsyncEngine) -> None:
        await collect(await engine.submit(b"x" + prompt, SamplingParams(max_tokens=2)))

    async def read(engine: AsyncEngine) -> None:
        text, _ = await collect(await engine.submit(prompt, SamplingParams(max_tokens=2)))
        assert text == "ab"
        assert engine.stats.disk.hit_tokens == 512

    for each in (use, leave, read):
        assert_nothing_is_left(with_engine(each, model()))
    assert len(files()) == 16
