"""The engine over small models: a request's life cycle; its tokens do not depend on the batch."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowlat.config.model import ModelConfig
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import Chunk, Request, TokenEvent
from lowlat.engine.runner import INITIAL_PAGES, ModelRunner
from lowlat.engine.scheduler import Limits
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from tests.fakes import ScriptedModel, gqa_config, mla_config, tiny_model

CONTEXT = 97
EOS = 257
CONFIGS = [gqa_config(), mla_config()]
MODELS = [tiny_model(config) for config in CONFIGS]


def engine_for(model: Transformer, page_size: int = 5, **options: Any) -> Engine:
    options = {"context": CONTEXT, "eos_ids": frozenset({EOS})} | options
    return Engine(ModelRunner(model, page_size=page_size), **options)


def counting_engine(**options: Any) -> Engine:
    """Every token is followed by its successor."""
    return engine_for(ScriptedModel(gqa_config(), lambda token: token + 1), **options)


def run(engine: Engine) -> dict[tuple[int, int], list[TokenEvent]]:
    """Step until nothing is left, accounting for all pages; events by (request, completion)."""
    events = defaultdict(list)
    while engine.has_work:
        for event in engine.step():
            events[event.request_id, event.index].append(event)
        engine.check_integrity()
    assert engine.runner.allocator.num_used == 0
    return events


def outputs(engine: Engine, prompt: list[int], **options: Any) -> list[list[int]]:
    request = engine.add(prompt, TokenSamplingParams(**options))
    run(engine)
    return [sequence.tokens[len(prompt) :] for sequence in request.sequences]


# The life of a request


def test_tokens_come_one_per_step_until_max_tokens() -> None:
    engine = counting_engine()
    request = engine.add([7, 11], TokenSamplingParams(max_tokens=3))
    events = run(engine)[request.id, 0]
    assert [event.token for event in events] == [12, 13, 14]
    assert [event.finish_reason for event in events] == [None, None, "length"]


def test_end_of_sequence_stops_and_is_reported() -> None:
    engine = counting_engine()
    request = engine.add([EOS - 2], TokenSamplingParams(max_tokens=9))
    events = run(engine)[request.id, 0]
    assert [(event.token, event.finish_reason) for event in events] == [
        (EOS - 1, None),
        (EOS, "stop"),
    ]


def test_ignore_eos_continues() -> None:
    assert outputs(counting_engine(), [EOS - 2], max_tokens=4, ignore_eos=True) == [
        [EOS - 1, EOS, EOS + 1, EOS + 2]
    ]


def test_without_max_tokens_the_context_is_filled_exactly() -> None:
    """Regression: the last position left unused, or one too many."""
    (tokens,) = outputs(counting_engine(context=19), [3, 5, 7])
    assert len(tokens) == 16


def test_a_prompt_that_leaves_one_place_gets_one_token() -> None:
    assert outputs(counting_engine(context=4), [3, 5, 7]) == [[8]]


def test_stopping_one_completion_does_not_end_the_others() -> None:
    engine = counting_engine()
    stopped = engine.add([1], TokenSamplingParams(max_tokens=5))
    other = engine.add([2], TokenSamplingParams(max_tokens=5))
    engine.step()
    engine.step()
    engine.stop(stopped.id, 0)
    events = run(engine)
    assert stopped.sequences[0].finish_reason == "stop"
    assert stopped.sequences[0].num_outputs == 2
    assert len(events[other.id, 0]) == 3 and (stopped.id, 0) not in events


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_abort_releases_all_pages_at_any_moment(steps: int) -> None:
    engine = counting_engine(prefill_chunk=7)
    params = TokenSamplingParams(max_tokens=20, temperature=1.0, n=3, ignore_eos=True)
    request = engine.add(list(range(11)), params)
    for _ in range(steps):
        engine.step()
    engine.abort(request.id)
    engine.abort(request.id)
    engine.check_integrity()
    assert engine.runner.allocator.num_used == 0 and not engine.has_work
    assert {sequence.finish_reason for sequence in request.sequences} == {"abort"}


def test_nan_logits_end_their_own_request_only() -> None:
    """Regression: one request's failure ending the others."""

    class Broken(ScriptedModel):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            scores = super().logits(hidden)
            scores[hidden[:, 0] == 13] = float("nan")
            return scores

    engine = engine_for(Broken(gqa_config(), lambda token: token + 1))
    bad = engine.add([10], TokenSamplingParams(max_tokens=5))
    good = engine.add([20], TokenSamplingParams(max_tokens=5))
    events = run(engine)
    assert [(event.token, event.finish_reason) for event in events[bad.id, 0]] == [
        (11, None),
        (12, None),
        (None, "error"),
    ]
    assert [event.token for event in events[good.id, 0]] == [21, 22, 23, 24, 25]


# Requests the model cannot serve


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        ([1] * 97, {}, r"97 tokens and the context is 97"),
        ([1] * 200, {}, r"200 tokens and the context is 97"),
        ([1] * 90, {"max_tokens": 8}, r"max_tokens 8 .* 90 tokens .* 97; .* at most 7"),
        ([263], {}, "vocabulary of 263"),
        ([-1], {}, "vocabulary of 263"),
        ([1], {"logit_bias": {263: 1.0}}, "logit_bias .* 263"),
    ],
)
def test_bad_requests_are_refused_with_the_numbers(
    prompt: list[int], options: dict[str, Any], message: str
) -> None:
    engine = counting_engine()
    with pytest.raises(UserError, match=message):
        engine.add(prompt, TokenSamplingParams(**options))
    assert not engine.has_work
    engine.check_integrity()


def test_a_prompt_that_is_too_long_is_not_looked_through() -> None:
    """Regression: millions of ids compared on the server's event loop."""

    class Ids(list[int]):
        def __iter__(self) -> Any:
            raise AssertionError("looked at every id")

    with pytest.raises(UserError, match="98 tokens and the context is 97"):
        counting_engine().check(Ids([1] * 98), TokenSamplingParams())


def test_more_completions_than_may_run_are_refused() -> None:
    """Regression: a request that waits forever."""
    engine = counting_engine(limits=Limits(max_sequences=3))
    with pytest.raises(UserError, match=r"n 4 exceeds the 3"):
        engine.add([1], TokenSamplingParams(n=4, temperature=1.0))


# Self-consistency: chunks, pages, batches and forks change no token


@pytest.mark.parametrize("model", MODELS, ids=["gqa", "mla"])
def test_generation_equals_recomputing_everything_for_every_token(model: Transformer) -> None:
    prompt = [31, 5, 200, 17, 17, 3, 90, 41, 8, 99, 12]
    (found,) = outputs(engine_for(model), prompt, max_tokens=20, ignore_eos=True)
    tokens = list(prompt)
    for _ in range(20):
        (again,) = outputs(engine_for(model), tokens, max_tokens=1, ignore_eos=True)
        tokens += again
    assert found == tokens[len(prompt) :]
    assert len(set(found)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=["gqa", "mla"])
def test_chunks_and_page_sizes_change_no_token(model: Transformer) -> None:
    prompt = [(i * 37) % 263 for i in range(40)]
    options: dict[str, Any] = {"max_tokens": 25, "temperature": 0.9, "seed": 3, "ignore_eos": True}
    expected = outputs(engine_for(model, page_size=97, prefill_chunk=512), prompt, **options)
    for page_size, chunk in ((1, 1), (3, 7), (5, 39), (64, 13)):
        engine = engine_for(model, page_size=page_size, prefill_chunk=chunk)
        assert outputs(engine, prompt, **options) == expected


@pytest.mark.parametrize("length", [4, 5, 6])
@pytest.mark.parametrize("model", MODELS, ids=["gqa", "mla"])
def test_completions_of_one_prompt_do_not_disturb_each_other(
    model: Transformer, length: int
) -> None:
    """Regression: a fork that writes into its siblings' partly filled page (of 5 tokens)."""
    prompt = [(i * 41) % 263 for i in range(length)]
    options: dict[str, Any] = {"temperature": 1.2, "seed": 9, "ignore_eos": True, "max_tokens": 9}
    engine = engine_for(model)
    together = outputs(engine, prompt, n=4, **options)
    assert together == _one_by_one(model, prompt, 4, options)
    assert len({tuple(tokens) for tokens in together}) == 4


def _one_by_one(
    model: Transformer, prompt: list[int], n: int, options: dict[str, Any]
) -> list[list[int]]:
    """Each completion computed while its siblings are stopped after the first token."""
    found = []
    for index in range(n):
        engine = engine_for(model)
        request = engine.add(prompt, TokenSamplingParams(n=n, **options))
        engine.step()
        for other in range(n):
            if other != index:
                engine.stop(request.id, other)
        run(engine)
        found.append(request.sequences[index].tokens[len(prompt) :])
    return found


def test_completions_share_the_full_pages_of_their_prompt() -> None:
    """Regression: the prompt cached n times. 12 tokens, pages of 5: two shared, one for each."""
    engine = counting_engine()
    params = TokenSamplingParams(max_tokens=9, temperature=1.0, n=3, ignore_eos=True)
    request = engine.add(list(range(12)), params)
    engine.step()
    assert engine.runner.allocator.num_used == 2 + 3
    assert [sequence.num_cached for sequence in request.sequences] == [12, 12, 12]
    lists = [sequence.pages for sequence in request.sequences]
    assert lists[0][:2] == lists[1][:2] == lists[2][:2]
    assert len({pages[2] for pages in lists}) == 3
    run(engine)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_batched_equals_alone(data: st.DataObject) -> None:
    """Requests added, some aborted, at random steps: the others' tokens are as when alone."""
    which = data.draw(st.integers(0, len(MODELS) - 1))
    engine = engine_for(
        MODELS[which],
        prefill_chunk=data.draw(st.sampled_from([3, 8, 512])),
        limits=Limits(max_sequences=data.draw(st.sampled_from([2, 3, 64]))),
    )
    added: list[tuple[Request, dict[str, Any]]] = []
    aborted: set[int] = set()
    for number in range(data.draw(st.integers(1, 6))):
        prompt = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=20))
        options: dict[str, Any] = {"max_tokens": data.draw(st.integers(1, 12)), "seed": number}
        if data.draw(st.booleans()):
            options |= {"temperature": 1.0, "n": data.draw(st.integers(1, 2)), "top_p": 0.9}
        added.append((engine.add(prompt, TokenSamplingParams(**options)), options))
        for _ in range(data.draw(st.integers(0, 5))):
            engine.step()
        if data.draw(st.integers(0, 4)) == 0:
            engine.abort(added[-1][0].id)
            aborted.add(number)
        engine.check_integrity()
    run(engine)
    for number, (request, options) in enumerate(added):
        if number not in aborted:
            prompt = list(request.prompt)
            found = [sequence.tokens[len(prompt) :] for sequence in request.sequences]
            assert found == outputs(engine_for(MODELS[which]), prompt, **options)


def test_the_cache_grows_with_use_and_preserves_its_entries() -> None:
    """Regression: entries lost when the cache grows between two steps."""
    config: ModelConfig = gqa_config()
    engine = engine_for(tiny_model(config), page_size=2)
    before = engine.runner.cache.num_pages
    prompt = [(i * 7) % 263 for i in range(29)]
    grown = outputs(engine, prompt, max_tokens=60, ignore_eos=True)
    assert engine.runner.cache.num_pages > before
    assert grown == outputs(
        engine_for(tiny_model(config), page_size=97), prompt, max_tokens=60, ignore_eos=True
    )


def test_times_are_in_order() -> None:
    engine = counting_engine()
    request = engine.add([1, 2, 3], TokenSamplingParams(max_tokens=4))
    assert request.started_at is None
    run(engine)
    (sequence,) = request.sequences
    assert request.started_at is not None
    assert sequence.first_token_at is not None and sequence.last_token_at is not None
    assert request.started_at <= sequence.first_token_at < sequence.last_token_at


def test_completions_fork_after_the_cache_has_grown() -> None:
    """Regression: a page copied in place in a cache that was made in inference mode."""
    engine = counting_engine()
    outputs(engine, list(range(90)), max_tokens=2)
    assert engine.runner.cache.num_pages > INITIAL_PAGES
    params = TokenSamplingParams(max_tokens=20, temperature=1.0, n=3, ignore_eos=True)
    request = engine.add(list(range(71)), params)
    run(engine)
    assert all(sequence.num_outputs == 20 for sequence in request.sequences)


# The prefix cache


def test_a_long_system_prompt_is_prefilled_once() -> None:
    """Four requests share a prefix of 4,096 tokens: in sequence, and two at once."""
    model = ScriptedModel(gqa_config(max_position_embeddings=8192), lambda token: token + 1)
    engine = Engine(ModelRunner(model), context=8192, eos_ids=frozenset())
    step, rows = engine.runner.step, []

    def counted(chunks: list[Chunk]) -> Any:
        rows.extend(len(chunk.tokens) for chunk in chunks)
        return step(chunks)

    engine.runner.step = counted  # pyright: ignore[reportAttributeAccessIssue]
    system = [(i * 37) % 200 for i in range(4096)]
    requests = []
    for questions in ([[1, 2, 3]], [[4, 5]], [[6], [7, 8, 9]]):
        prompts = [system + question for question in questions]
        requests += [engine.add(prompt, TokenSamplingParams(max_tokens=1)) for prompt in prompts]
        run(engine)
    assert sum(rows) == 4096 + 3 + 2 + 1 + 3
    assert [request.num_matched for request in requests] == [0, 4096, 4096, 4096]


def test_a_preempted_prompt_does_not_count_its_own_pages_as_hits() -> None:
    """Regression: cached tokens reported for prompts that were never sent before."""
    model = ScriptedModel(gqa_config(), lambda token: (token + 1) % 200)
    limits = Limits(max_pages=20, mixed_tokens=4, step_tokens=4)
    engine = engine_for(
        model, page_size=4, prefill_chunk=4, limits=limits, speculates=False, eos_ids=frozenset()
    )
    old = [engine.add([100 + i], TokenSamplingParams(max_tokens=28)) for i in range(2)]
    for _ in range(12):
        engine.step()
    late = engine.add(list(range(36)), TokenSamplingParams(max_tokens=5))
    run(engine)
    assert engine.scheduler.num_preemptions > 0 and old[0].sequences[0].num_outputs == 28
    assert late.num_matched == 0
    assert engine.recorder.snapshot().cached_prompt_tokens == 0
