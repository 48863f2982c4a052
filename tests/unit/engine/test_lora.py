"""LoRA adapters in the engine in PyTorch: each request's adapter, in any batch; their own pages."""

from collections.abc import Sequence
from typing import Any

import pytest

from lowlat.config.model import ModelConfig
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import LoRARequest, RequestOptions
from lowlat.engine.runner import ModelRunner
from lowlat.model.lora import add_adapters
from tests.fakes import gqa_config, mla_config, tiny_model
from tests.lora import drawn_updates

PROMPT = [(7 * place) % 251 for place in range(33)]
CONFIGS = [gqa_config(), mla_config()]


def engine_with(config: ModelConfig, numbers: Sequence[int], **options: Any) -> Engine:
    """With the adapters `numbers`, which are the same in every engine of `config`."""
    model = tiny_model(config)
    adapters = [drawn_updates(model, rank=number, seed=number) for number in numbers]
    selected = add_adapters(model, adapters)
    runner = ModelRunner(model, page_size=5, num_pages=64, selected_adapter=selected)
    return Engine(runner, context=97, eos_ids=frozenset(), **options)


def options_for(number: int, lora_int_id: int, namespace: bytes = b"") -> RequestOptions:
    if number == 0:
        return RequestOptions(cache_namespace=namespace)
    lora = LoRARequest(lora_name="x", lora_int_id=lora_int_id, lora_path="", digest=bytes([number]))
    return RequestOptions(lora=lora, cache_namespace=namespace)


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.check_integrity()


PARAMS = TokenSamplingParams(max_tokens=9, temperature=1.0, seed=3)


@pytest.mark.parametrize("config", CONFIGS, ids=["gqa", "mla"])
def test_a_batch_of_adapters_gives_the_tokens_of_each_alone(config: ModelConfig) -> None:
    """Prompts of one text: the base model and two adapters, each twice and of two lengths."""
    prompts = [PROMPT[: 33 - number] for number in range(6)]
    engine = engine_with(config, [1, 2])
    requests = [
        engine.add(prompt, PARAMS, options_for(i % 3, i % 3)) for i, prompt in enumerate(prompts)
    ]
    run(engine)
    texts = set()
    for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        alone = engine_with(config, [i % 3] if i % 3 else [], speculates=False)
        expected = alone.add(prompt, PARAMS, options_for(i % 3, 1))
        run(alone)
        assert request.sequences[0].tokens == expected.sequences[0].tokens
        texts.add(tuple(expected.sequences[0].tokens[len(prompt) :]))
    assert len(texts) >= 5


def test_pages_belong_to_an_adapter_and_a_namespace() -> None:
    """Regression: entries of one adapter that another computes with."""
    engine = engine_with(CONFIGS[0], [1, 2], speculates=False)
    matched = []
    for number, namespace in ((0, b""), (1, b""), (2, b""), (1, b"key"), (1, b""), (0, b"")):
        options = options_for(number, number, namespace)
        request = engine.add(PROMPT, TokenSamplingParams(max_tokens=1), options)
        run(engine)
        matched.append(request.num_matched)
    assert matched == [0, 0, 0, 0, 30, 30]


def test_prompts_of_one_batch_wait_for_pages_of_their_own_adapter_only() -> None:
    """Regression: a request that waits for another's prefill and then computes it again."""
    engine = engine_with(CONFIGS[0], [1, 2], speculates=False, prefill_chunk=10)
    requests = [
        engine.add(PROMPT, TokenSamplingParams(max_tokens=2), options_for(number, number))
        for number in (1, 1, 2)
    ]
    run(engine)
    assert [request.num_matched for request in requests] == [0, 30, 0]
