"""LoRA adapters in the engine on native kernels: a request's tokens are those of an engine with its
adapter alone, with chunked prefill, preemption, prefix caches in memory and on disk, and drafts.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.config.model import ModelConfig
from lowlat.engine.disk_cache import DiskCacheOptions
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import LoRARequest, Request, RequestOptions
from lowlat.engine.scheduler import Limits
from lowlat.model.lora import add_adapters
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from tests.configs import PLAIN_MOE
from tests.lora import ATTENTION, drawn_updates

from .storages import stored_model
from .test_batch_invariance import (
    Ask,
    drawn_asks,
    engine_for,
    generated,
    page_size_for,
    small_config,
)

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

KINDS = ("mtp", "gqa", "moe", "dsa")
NUM_ADAPTERS = 3


def config_of(kind: str) -> ModelConfig:
    if kind == "moe":
        return replace(small_config("mla"), moe=PLAIN_MOE)
    return small_config(kind)


def model_with(config: ModelConfig, storage: str, numbers: Sequence[int]) -> Transformer:
    """A model with the adapters `numbers`, which are the same in every model of `config`."""
    torch.manual_seed(5)  # of quantized weights
    model = stored_model(config, 5, storage)
    ranks = (11, 8, 3)
    names = (ATTENTION, ("o_proj", "down_proj"), (*ATTENTION, "gate_proj", "up_proj"))
    drawn = zip(ranks, names, strict=True)
    every = [drawn_updates(model, rank=rank, seed=rank, names=own) for rank, own in drawn]
    add_adapters(model, [every[number - 1] for number in numbers])
    return model


def request_for(number: int, place: int | None = None) -> LoRARequest | None:
    """Adapter `number`, loaded as number `place` of the model."""
    if number == 0:
        return None
    return LoRARequest(
        lora_name=f"adapter-{number}",
        lora_int_id=number if place is None else place,
        lora_path="",
        digest=bytes([number]),
    )


def alone(model: Transformer, ask: Ask, number: int) -> list[list[int]]:
    """Tokens of the only request of an engine without cache and drafts, with one adapter."""
    engine = engine_for(model, has_prefix_cache=False, speculates=False)
    options = RequestOptions(lora=request_for(number, 1))
    request = engine.add(ask.prompt, TokenSamplingParams(**ask.options), options)
    while engine.has_work:
        engine.step()
    return generated(request)


def together(engine: Engine, asks: list[Ask], concurrency: int) -> list[Request]:
    """Ask i uses adapter i % 4; requests arrive at random moments."""
    rng = random.Random(concurrency)
    requests: list[Request] = []
    while len(requests) < len(asks) or engine.has_work:
        open_now = sum(any(s.finish_reason is None for s in r.sequences) for r in requests)
        while len(requests) < len(asks) and open_now < concurrency and rng.random() < 0.7:
            number = len(requests)
            options = RequestOptions(lora=request_for(number % (NUM_ADAPTERS + 1)))
            params = TokenSamplingParams(**asks[number].options)
            requests.append(engine.add(asks[number].prompt, params, options))
            open_now += 1
        engine.step()
        engine.copy_all()
    engine.check_integrity()
    return requests


def asks_for(count: int) -> list[Ask]:
    """Every prompt comes once for each adapter and the base model, which must not share pages."""
    return [ask for ask in drawn_asks(11, count) for _ in range(NUM_ADAPTERS + 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["bf16", pytest.param("int8", marks=pytest.mark.slow), "int4"])
@torch.inference_mode()
def test_not_one_token_differs_from_the_adapter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, storage: str
) -> None:
    config = config_of(kind)
    asks = asks_for(6)
    models = [model_with(config, storage, [n] if n else []) for n in range(NUM_ADAPTERS + 1)]
    expected = [alone(models[i % len(models)], ask, i % len(models)) for i, ask in enumerate(asks)]
    by_prompt = [expected[i : i + len(models)] for i in range(0, len(expected), len(models))]
    assert sum(len({str(tokens) for tokens in found}) > 1 for found in by_prompt) >= 4
    mixed = model_with(config, storage, range(1, NUM_ADAPTERS + 1))
    hits = preemptions = 0
    disk: dict[str, Any] = {"disk": DiskCacheOptions(folder=tmp_path, max_bytes=1 << 24)}
    longest = -(-(max(len(ask.prompt) for ask in asks) + 80) // page_size_for(config))
    for options in (
        {"speculates": False, "has_prefix_cache": False},
        {"limits": Limits(step_tokens=40, mixed_tokens=5, max_pages=longest + 1)},
        disk,
        disk,
    ):
        engine = engine_for(mixed, **options)
        if engine.speculator is not None:
            for learn in ("drafted", "stepped"):
                monkeypatch.setattr(engine.speculator.policy, learn, lambda count, seconds: None)
        requests = together(engine, asks, 8)
        for ask, request, tokens in zip(asks, requests, expected, strict=True):
            assert generated(request) == tokens, (options, ask)
        preemptions += engine.scheduler.num_preemptions
        hits += 0 if engine.disk is None else engine.disk.recorder.snapshot().hit_tokens
        engine.close()
    assert preemptions > 0 and hits > 0
