"""Batch invariance of the engine on native kernels: a request's tokens do not depend on the batch.

Regression: a token that changes with batch composition, prompt chunking, prefix cache contents,
preemption and recomputation, draft tokens, or the number of threads.

LOWLAT_INVARIANCE_REQUESTS sets the number of requests per concurrency, and runs every concurrency
with prefix cache and draft tokens on and off (by default each is off once):

    LOWLAT_INVARIANCE_REQUESTS=1000 python -m pytest tests/native/test_batch_invariance.py -rP

which also prints statistics.
"""

import os
import random
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch

from lowlat.config.model import IndexerConfig, MLAConfig, ModelConfig
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import Request, RequestOptions
from lowlat.engine.runner import ModelRunner
from lowlat.engine.scheduler import Limits
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from tests.configs import GQA
from tests.fakes import mla_config
from tests.lowlat_configs import LAYERS
from tests.native.test_step import random_model

from .inputs import thread_count

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

VOCAB = 61
PAGE_SIZE = 8
CHUNK = 48
NUM_REQUESTS = {"mla": 80, "gqa": 30, "mtp": 24, "layers": 24, "dsa": 32}
"""For each of four concurrencies."""
SWITCHES = {1: [(True, True)], 2: [(False, True)], 8: [(True, False)], 32: [(True, True)]}
"""By concurrency: prefix cache on, draft tokens on."""
THREADS = {1: 1, 2: 1, 8: 2, 32: 3}
"""By concurrency: more where steps are few, as threads that share a processor wait long."""
if REQUESTS := os.environ.get("LOWLAT_INVARIANCE_REQUESTS"):
    NUM_REQUESTS = dict.fromkeys(NUM_REQUESTS, int(REQUESTS))
    SWITCHES = {concurrency: [*product((True, False), repeat=2)] for concurrency in SWITCHES}
INDEXER = IndexerConfig(index_n_heads=3, index_head_dim=10, index_topk=29, index_rope_head_dim=2)
"""Prompts are shorter and longer; keys rotate at the first of 16 frequencies."""
CONTEXT = 400
MAX_TOKENS = 80
"""Of some requests, which outgrow the pages they were admitted with."""


def small_config(kind: str) -> ModelConfig:
    config = mla_config(vocab_size=VOCAB, max_position_embeddings=512, num_nextn_predict_layers=0)
    if kind == "gqa":
        return replace(config, model_type="llama", attention=replace(GQA, num_key_value_heads=3))
    if kind == "layers":
        differing = LAYERS["all"]
        sizes = {"vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_ids": ()}
        return replace(differing, **sizes)
    if kind == "dsa":
        mla = config.attention
        assert isinstance(mla, MLAConfig)
        # entries in whole steps of the tile products
        full = replace(mla, kv_lora_rank=32, qk_rope_head_dim=32, indexer=INDEXER)
        shared = replace(full, indexer=replace(INDEXER, is_shared=True))
        return replace(config, attention=(full, shared), num_nextn_predict_layers=1)
    return replace(config, num_nextn_predict_layers=2 if kind == "mtp" else 0)


def page_size_for(config: ModelConfig) -> int:
    """Index keys are in tiles of 16 tokens."""
    return 2 * PAGE_SIZE if config.is_sparse else PAGE_SIZE


@dataclass(frozen=True)
class Ask:
    """A request as a client sends it."""

    prompt: tuple[int, ...]
    options: dict[str, Any]
    cache_namespace: bytes
    priority: int


def drawn_asks(seed: int, count: int) -> list[Ask]:
    """Prompts of all lengths, many of which begin alike; greedy and sampled, with penalties."""
    rng = random.Random(seed)
    openings = [[rng.randrange(VOCAB) for _ in range(length)] for length in (9, 33, 70, 150)]
    asks = []
    for number in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 7, 30, 45, 90]))]
        if rng.random() < 0.6:
            prompt = rng.choice(openings) + prompt
        longest = MAX_TOKENS if rng.random() < 0.3 else 20
        options: dict[str, Any] = {"max_tokens": rng.randint(1, longest), "ignore_eos": True}
        if rng.random() < 0.5:
            options |= {"temperature": 0.8, "seed": number, "top_p": rng.choice([1.0, 0.9])}
            options["n"] = rng.choice([1, 1, 2])
        if rng.random() < 0.2:
            options["frequency_penalty"] = 0.5
        asks.append(Ask(tuple(prompt), options, bytes([rng.randrange(2)]), rng.randrange(2)))
    return asks


def engine_for(model: Transformer, **options: Any) -> Engine:
    runner = ModelRunner(model, page_size=page_size_for(model.config))
    assert runner.is_batch_invariant
    return Engine(runner, context=CONTEXT, eos_ids=frozenset(), prefill_chunk=CHUNK, **options)


def generated(request: Request) -> list[list[int]]:
    assert all(s.finish_reason == "length" for s in request.sequences)
    return [sequence.tokens[len(request.prompt) :] for sequence in request.sequences]


def alone(model: Transformer, ask: Ask) -> list[list[int]]:
    engine = engine_for(model, has_prefix_cache=False, speculates=False)
    request = engine.add(ask.prompt, TokenSamplingParams(**ask.options))
    while engine.has_work:
        engine.step()
    return generated(request)


def together(engine: Engine, asks: list[Ask], concurrency: int, seed: int) -> list[Request]:
    """Requests arrive at random moments, at most `concurrency` at once."""
    rng = random.Random(seed)
    requests: list[Request] = []
    while len(requests) < len(asks) or engine.has_work:
        open_now = sum(any(s.finish_reason is None for s in r.sequences) for r in requests)
        while len(requests) < len(asks) and open_now < concurrency and rng.random() < 0.7:
            ask = asks[len(requests)]
            options = RequestOptions(cache_namespace=ask.cache_namespace, priority=ask.priority)
            requests.append(engine.add(ask.prompt, TokenSamplingParams(**ask.options), options))
            open_now += 1
        engine.step()
    engine.check_integrity()
    return requests


@dataclass(frozen=True)
class Happened:
    """To the requests of an engine."""

    preemptions: int
    hits: int
    """Tokens that the prefix cache had."""
    accepted: int
    """Drafts that were kept."""

    @classmethod
    def to(cls, engine: Engine) -> "Happened":
        return cls(
            preemptions=engine.scheduler.num_preemptions,
            hits=0 if engine.prefix is None else engine.prefix.hit_tokens,
            accepted=engine.recorder.snapshot().accepted_tokens,
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", NUM_REQUESTS)
@torch.inference_mode()
def test_not_one_token_differs_from_running_alone(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = small_config(kind)
    model = random_model(config, 5)
    asks = drawn_asks(11, NUM_REQUESTS[kind])
    with thread_count(1):
        expected = [alone(model, ask) for ask in asks]
    assert len({tuple(tokens) for found in expected for tokens in found}) > NUM_REQUESTS[kind]
    num_tokens = sum(len(tokens) for found in expected for tokens in found)
    longest = -(-(max(len(ask.prompt) for ask in asks) + MAX_TOKENS) // page_size_for(config))
    found = []
    for number, (concurrency, switches) in enumerate(SWITCHES.items()):
        for has_cache, speculates in switches:
            engine = engine_for(
                model,
                limits=Limits(
                    step_tokens=random.Random(number).choice([40, 96]),
                    mixed_tokens=random.Random(number).choice([5, 24]),
                    # The longest request leaves no free page.
                    max_pages=longest if concurrency > 1 else None,
                ),
                has_prefix_cache=has_cache,
                speculates=speculates,
            )
            if engine.speculator is not None:
                # On slow machines, too, there are draft tokens whose number the batch changes.
                for learn in ("drafted", "stepped"):
                    monkeypatch.setattr(
                        engine.speculator.policy, learn, lambda count, seconds: None
                    )
            with thread_count(THREADS[concurrency]):
                requests = together(engine, asks, concurrency, number)
            for ask, request, tokens in zip(asks, requests, expected, strict=True):
                assert generated(request) == tokens, (concurrency, has_cache, speculates, ask)
            found.append(Happened.to(engine))
            print(
                f"{kind}, {concurrency} at once, prefix cache {has_cache}, drafts {speculates}: "
                f"{len(asks)} requests, {num_tokens} tokens, none differs; {found[-1]}"
            )
    assert sum(one.preemptions for one in found) > 1, found
    assert sum(one.hits for one in found) > 1000, found
    assert sum(one.accepted for one in found) > 5, found
