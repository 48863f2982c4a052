"""min_tokens, allowed_token_ids and bad words: by hand, and in any batch composition."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import RequestOptions
from lowlat.engine.runner import ModelRunner
from lowlat.engine.token_bans import TokenBans
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from tests.fakes import mla_config, tiny_model

VOCAB = 7
EOS = 5
CONTEXT = 97
PROMPT = (3, 1, 4, 1, 5)


def banned(outputs: tuple[int, ...], bad_words: Any = (), **options: Any) -> set[int]:
    bans = TokenBans(
        TokenSamplingParams(**options),
        end_ids=frozenset({EOS, 999}),
        bad_words=bad_words,
        vocab_size=VOCAB,
    )
    for token in outputs:
        bans.record(token)
    logits = bans.apply(torch.zeros(VOCAB))
    return {token for token in range(VOCAB) if logits[token].isinf()}


def test_min_tokens_bans_the_ends_up_to_its_count() -> None:
    assert banned((), min_tokens=2) == banned((1,), min_tokens=2) == {EOS}
    assert banned((1, 1), min_tokens=2) == banned(()) == set()


def test_allowed_token_ids_ban_all_others() -> None:
    assert banned((), allowed_token_ids=(2, 6)) == {0, 1, 3, 4, 5}


def test_bad_words_ban_their_last_token_after_the_others() -> None:
    words = ((4,), (1, 2, 3), (2, 0))
    assert banned((), words) == banned((1,), words) == banned((2, 1), words) == {4}
    assert banned((6, 1, 2), words) == {4, 3, 0}
    assert banned((1, 2, 6), words) == {4}
    assert banned((2,), words) == {4, 0}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(mla_config(max_position_embeddings=CONTEXT))


def engine_of(model: Transformer) -> Engine:
    runner = ModelRunner(model, page_size=4)
    return Engine(runner, context=CONTEXT, eos_ids=frozenset({EOS}))


def run(model: Transformer, requests: list[tuple[TokenSamplingParams, RequestOptions]]) -> Any:
    """Outputs of all requests, run together."""
    engine = engine_of(model)
    added = [engine.add(PROMPT, params, options).sequences[0] for params, options in requests]
    while engine.has_work:
        engine.step()
    return [(tuple(one.tokens[len(PROMPT) :]), one.finish_reason) for one in added]


LIMITS = [
    {"min_tokens": 20},
    {"allowed_token_ids": (2, 3, 7, 11, 200)},
    {"stop_token_ids": tuple(range(100, 200))},
    {"min_tokens": 9, "stop_token_ids": tuple(range(120))},
    {},
]


def test_tokens_do_not_depend_on_the_batch(model: Transformer) -> None:
    requests = [
        (
            TokenSamplingParams(max_tokens=30, temperature=2.0, seed=seed, **limits),
            RequestOptions(bad_words=((17,), (2, 3)) if seed % 2 else ()),
        )
        for seed, limits in enumerate([*LIMITS, *LIMITS])
    ]
    alone = [run(model, [request])[0] for request in requests]
    assert run(model, requests) == alone
    assert run(model, requests[::-1])[::-1] == alone
    for (params, options), (tokens, reason) in zip(requests, alone, strict=True):
        ends = {EOS, *params.stop_token_ids}
        assert not ends & set(tokens[: params.min_tokens]) and not ends & set(tokens[:-1])
        assert reason == ("stop" if tokens[-1] in ends else "length")
        if params.allowed_token_ids is not None:
            assert set(tokens) <= set(params.allowed_token_ids)
        for word in options.bad_words:
            pairs = [tokens[at : at + len(word)] for at in range(len(tokens))]
            assert word not in pairs


def test_stop_token_ids_end_greedy_outputs(model: Transformer) -> None:
    params = TokenSamplingParams(max_tokens=20, ignore_eos=True)
    ((tokens, _),) = run(model, [(params, RequestOptions())])
    stopped = replace(params, stop_token_ids=(tokens[7],))
    ((short, reason),) = run(model, [(stopped, RequestOptions())])
    assert (short, reason) == (tokens[: tokens.index(tokens[7]) + 1], "stop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9 exceeds max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is empty"),
        ({"stop_token_ids": (True,)}, "stop_token_ids"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenSamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": CONTEXT}, "min_tokens"),
        ({"stop_token_ids": (5000,)}, "stop_token_ids names token 5000"),
        ({"allowed_token_ids": (1, 5000)}, "allowed_token_ids names token 5000"),
        ({"min_tokens": 1, "allowed_token_ids": (EOS, 8), "stop_token_ids": (8,)}, "forbids"),
    ],
)
def test_options_that_the_model_cannot_serve(
    model: Transformer, options: dict[str, Any], message: str
) -> None:
    engine = engine_of(model)
    with pytest.raises(UserError, match=message):
        engine.add(PROMPT, TokenSamplingParams(**options))
