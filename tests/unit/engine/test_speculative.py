"""Speculative decoding: sources and number of draft tokens; they change no output."""

import re
from collections import Counter
from typing import Any

import pytest
import torch

from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.prompt_lookup import PromptLookup
from lowlat.engine.request import RequestOptions
from lowlat.engine.runner import ModelRunner
from lowlat.generate.grammar import GrammarCompiler
from lowlat.generate.structured import Regex
from lowlat.model.transformer import Transformer
from tests.fakes import ScriptedModel, byte_tokenizer, gqa_config, mla_config, tiny_model


def engine_for(model: Transformer, **options: Any) -> Engine:
    """A step costs as much as one token, and a tenth more for each further token."""
    runner = ModelRunner(model, page_size=4)
    engine = Engine(runner, context=97, eos_ids=frozenset(), **options)
    if engine.speculator is not None:
        engine.speculator.stepped = lambda num_tokens, seconds: None  # pyright: ignore
    return engine


def always_draft(engine: Engine, depth: int) -> None:
    assert engine.speculator is not None
    engine.speculator.policy.choose = lambda most: {s: min(depth, n) for s, n in most.items()}


def finish(engine: Engine) -> int:
    """Step to the end; the number of steps."""
    steps = 0
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        steps += 1
    return steps


def outputs(engine: Engine, prompt: list[int], **options: Any) -> list[list[int]]:
    request = engine.add(prompt, TokenSamplingParams(**options))
    finish(engine)
    return [sequence.tokens[len(prompt) :] for sequence in request.sequences]


# Prompt lookup


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([], []),
        ([1, 2], []),
        ([1, 2, 3], []),
        ([1, 2, 9, 1, 2], [9, 1, 2]),
        ([1, 2, 8, 4, 1, 2, 9, 4, 1, 2], [9, 4, 1]),
        # The longer match wins over the later one.
        ([7, 1, 2, 8, 5, 1, 2, 9, 7, 1, 2], [8, 5, 1]),
        ([3, 3, 3, 3], [3]),
        # One token that recurs is no reason.
        ([5, 1, 6, 2, 5], []),
    ],
)
def test_lookup_finds_what_followed(tokens: list[int], found: list[int]) -> None:
    assert PromptLookup().propose(tokens, 3) == found


def test_lookup_grows_with_its_sequence() -> None:
    """A long sequence, token by token: the same as a search from scratch."""
    tokens = [(i * i) % 11 for i in range(700)]
    lookup = PromptLookup()
    for end in range(1, len(tokens)):
        assert lookup.propose(tokens[:end], 4) == PromptLookup().propose(tokens[:end], 4)


# How many


def test_prefill_is_no_cost_of_drafting() -> None:
    """Regression: an MTP module's time for the entries of a prompt counted as cost of drafting."""
    engine = engine_for(tiny_model(mla_config(num_nextn_predict_layers=1)))
    always_draft(engine, 1)
    assert engine.speculator is not None
    counted: list[int] = []
    engine.speculator.policy.drafted = lambda num_drafts, seconds: counted.append(num_drafts)
    request = engine.add([(i * 29) % 263 for i in range(30)], TokenSamplingParams(max_tokens=9))
    rounds: list[bool] = []
    while engine.has_work:
        engine.step()
        rounds.append(any(one.draft_tokens for one in request.sequences))
    assert rounds[0]
    assert len(counted) == sum(rounds) - 1 > 2


# Verifying


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "seed": 3}])
def test_drafts_change_no_token(options: dict[str, Any]) -> None:
    """A model that repeats a cycle of seven: prompt lookup is right from the second cycle on."""
    model = ScriptedModel(gqa_config(), lambda token: (token + 1) % 7)
    options = {"max_tokens": 60} | options
    with_drafts, without = engine_for(model), engine_for(model, speculates=False)
    assert outputs(with_drafts, [3, 4], **options) == outputs(without, [3, 4], **options)
    assert with_drafts.recorder.snapshot().accepted_tokens > 20


def test_right_drafts_save_steps() -> None:
    model = ScriptedModel(gqa_config(), lambda token: (token + 1) % 7)
    engine = engine_for(model)
    engine.add([3, 4], TokenSamplingParams(max_tokens=60))
    assert finish(engine) < 40


@pytest.mark.parametrize("end", [{"max_tokens": 11}, {"stop": 5}])
def test_a_completion_ends_in_the_middle_of_its_drafts(end: dict[str, Any]) -> None:
    """Regression: tokens after the end, because they were verified in the same step."""
    model = ScriptedModel(gqa_config(), lambda token: (token + 1) % 13)
    prompt = [*range(13), 0, 1]
    stop_token_ids = frozenset({end["stop"]}) if "stop" in end else frozenset()
    engine = engine_for(model)
    params = TokenSamplingParams(max_tokens=end.get("max_tokens"))
    request = engine.add(prompt, params, RequestOptions(stop_token_ids=stop_token_ids))
    finish(engine)
    generated = request.sequences[0].tokens[len(prompt) :]
    expected = 4 if stop_token_ids else 11
    assert generated == [(2 + i) % 13 for i in range(expected)]
    assert engine.runner.allocator.num_used == 0


@pytest.mark.slow
@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_mtp_drafts_change_no_token(modules: int, options: dict[str, Any]) -> None:
    model = tiny_model(mla_config(num_nextn_predict_layers=modules))
    prompt = [(i * 37) % 263 for i in range(23)]
    options = {"max_tokens": 40} | options
    engine = engine_for(model, prefill_chunk=8)
    assert outputs(engine, prompt, **options) == outputs(
        engine_for(model, speculates=False), prompt, **options
    )
    assert engine.recorder.snapshot().drafted_tokens > 0


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_mtp_drafts_are_what_the_modules_predict(modules: int) -> None:
    """Regression: a module that sees the wrong position, token or row: the drafts equal those
    computed from scratch."""
    model = tiny_model(mla_config(num_nextn_predict_layers=modules))
    engine = engine_for(model)
    always_draft(engine, modules)
    request = engine.add([(i * 29) % 263 for i in range(11)], TokenSamplingParams(max_tokens=12))
    seen = 0
    while engine.has_work:
        engine.step()
        (one,) = request.sequences
        if one.draft_tokens:
            fresh = fresh_drafts(model, one.tokens, modules)
            assert one.draft_tokens == fresh[: len(one.draft_tokens)]
            seen += 1
    assert seen >= 5


@torch.inference_mode()
def fresh_drafts(model: Transformer, tokens: list[int], modules: int) -> list[int]:
    """Module k after module k - 1 over all tokens, without a cache of earlier steps."""
    from lowlat.engine.request import Chunk

    runner = ModelRunner(model, page_size=97)
    pages: list[int] = []
    runner.reserve(pages, len(tokens) + modules)
    read = tokens[:-1]
    whole = Chunk(tokens=read, start=0, pages=tuple(pages), num_logits=0, path="absorbed")
    _, hidden = runner.step([whole])
    known = list(tokens)
    for module in range(modules):
        ahead = known[module + 1 : module + 1 + len(read)]
        chunk = Chunk(tokens=ahead, start=0, pages=tuple(pages), num_logits=1, path="absorbed")
        hidden, logits = runner.mtp(module, hidden, [chunk])
        known.append(int(logits.argmax()))
    return known[len(tokens) :]


@pytest.mark.slow
def test_sampled_output_has_the_models_distribution() -> None:
    """Chi-squared over pairs of tokens: with drafts as without, and equal to the softmax."""
    config = gqa_config(vocab_size=5)
    model = tiny_model(config)
    # What the model likes to say goes round in a circle, so that drafts are often right.
    prompt = [1, 2]
    prompt += outputs(engine_for(model), prompt, max_tokens=40)[0]
    count, options = 600, {"max_tokens": 3, "temperature": 1.3}
    engine = engine_for(model)
    always_draft(engine, 2)
    pairs: Counter[tuple[int, ...]] = Counter()
    for start in range(0, count, 100):
        requests = [
            engine.add(prompt, TokenSamplingParams(seed=start + i, **options)) for i in range(100)
        ]
        finish(engine)
        pairs.update(tuple(r.sequences[0].tokens[-2:]) for r in requests)
    assert engine.recorder.snapshot().accepted_tokens > 100
    expected = pair_probabilities(model, prompt, 1.3)
    # Pairs that are rare make one cell together.
    cells = [(pairs[pair], count * p) for pair, p in expected.items() if count * p >= 5]
    rest = count - sum(seen for seen, _ in cells), count - sum(due for _, due in cells)
    chi_squared = sum((seen - due) ** 2 / due for seen, due in [*cells, rest])
    # Of 24 degrees of freedom at most: above 51.2 in one of a thousand runs; seeds are fixed.
    assert len(cells) > 8 and chi_squared < 51.2


@torch.inference_mode()
def pair_probabilities(
    model: Transformer, prompt: list[int], temperature: float
) -> dict[tuple[int, int], float]:
    """Of the second and third token after the prompt, over all first ones."""
    from lowlat.engine.scoring import logits

    def following(tokens: list[int]) -> list[float]:
        row = logits(ModelRunner(model, page_size=97), tokens, chunk=64)[-1].double()
        return (row / temperature).softmax(0).tolist()

    found: Counter[tuple[int, int]] = Counter()
    for one, p_one in enumerate(following(prompt)):
        for two, p_two in enumerate(following([*prompt, one])):
            for three, p_three in enumerate(following([*prompt, one, two])):
                found[two, three] += p_one * p_two * p_three
    return dict(found)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_drafts_change_no_structured_output(options: dict[str, Any]) -> None:
    """Regression: a grammar that has advanced by rejected drafts."""
    model = ScriptedModel(gqa_config(), lambda token: ord("a") + (token + 1) % 3)
    tokenizer = byte_tokenizer()
    compiler = GrammarCompiler(tokenizer, model.config.vocab_size)
    prompt = list(b"abcabdabcabdabc")
    found = []
    for speculates in (True, False):
        engine = engine_for(model, speculates=speculates)
        if speculates:
            always_draft(engine, 3)
        grammar = compiler.compile(Regex(pattern="([abc]{3}-){5}"))
        params = TokenSamplingParams(max_tokens=60, **options)
        requests = [
            engine.add(prompt, params, RequestOptions(constraint=grammar)) for _ in range(3)
        ]
        finish(engine)
        found.append([request.sequences[0].tokens[len(prompt) :] for request in requests])
        assert (engine.recorder.snapshot().drafted_tokens > 0) is speculates
    assert found[0] == found[1]
    for tokens in found[0]:
        assert re.fullmatch("([abc]{3}-){5}", bytes(t for t in tokens if t < 256).decode())


# Faults


def test_an_error_in_the_lookup_leaves_one_sequence_without_drafts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: an engine that ends all requests because drafting failed."""
    propose = PromptLookup.propose

    def broken(self: PromptLookup, tokens: list[int], most: int) -> list[int]:
        if tokens[0] == 200:
            raise RuntimeError("no guess")
        return propose(self, tokens, most)

    model = ScriptedModel(gqa_config(), lambda token: (token + 1) % 7)
    engine = engine_for(model)
    always_draft(engine, 3)
    monkeypatch.setattr(PromptLookup, "propose", broken)
    bad, good = (
        engine.add([first, 3, 4], TokenSamplingParams(max_tokens=60)) for first in (200, 8)
    )
    finish(engine)
    expected = [(5 + place) % 7 for place in range(60)]
    for request in (bad, good):
        assert request.sequences[0].tokens[3:] == expected
    assert engine.recorder.snapshot().accepted_tokens > 20
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        "request 0 continues without draft tokens"
    ]


@pytest.mark.parametrize("modules", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_in_the_mtp_modules_changes_no_token(
    monkeypatch: pytest.MonkeyPatch, modules: int
) -> None:
    """Also during prefill, in which the modules take part."""
    model = tiny_model(mla_config(num_nextn_predict_layers=modules))
    prompts = [[(i * step) % 200 for i in range(23)] for step in (37, 29)]
    poisoned = [[*prompt[:20], 262, *prompt[20:]] for prompt in prompts[:1]]
    mtp = ModelRunner.mtp

    def broken(self: ModelRunner, depth: int, hidden: torch.Tensor, chunks: list[Any]) -> Any:
        if any(262 in chunk.tokens for chunk in chunks):
            raise RuntimeError("no guess")
        return mtp(self, depth, hidden, chunks)

    found = []
    for speculates in (False, True):
        engine = engine_for(model, prefill_chunk=8, speculates=speculates)
        if speculates:
            always_draft(engine, modules + 1)
            monkeypatch.setattr(ModelRunner, "mtp", broken)
        requests = [
            engine.add(prompt, TokenSamplingParams(max_tokens=20)) for prompt in poisoned + prompts
        ]
        finish(engine)
        found.append([request.sequences[0].tokens for request in requests])
        assert (engine.recorder.snapshot().drafted_tokens > 0) is speculates
    assert found[0] == found[1]
