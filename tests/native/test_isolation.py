"""A request whose activations are NaN changes no bit of other requests in the batch or after it.

Regression: a product that reads whole panels of 32 columns beyond its own: the weights there are 0,
but the values belong to another request.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.attention.path import AttentionPath
from lowlat.config.model import ModelConfig
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import Request
from lowlat.engine.runner import ModelRunner
from lowlat.model.native import NativeModel
from lowlat.model.transformer import Transformer
from tests.fakes import MLA, gqa_config, mla_config, tiny_model
from tests.lowlat_configs import LAYERS

from .inputs import LEVELS, assert_same_bits, needs_native, thread_count
from .test_step import every_level

pytestmark = needs_native

BAD = 7
"""The token whose embedding is NaN."""
GOOD = [1, 2, 3, 4, 5]
PAGE_SIZE = 16
FORMS: tuple[AttentionPath, ...] = ("decode", "absorbed", "expanded")


def mla(*, nope: int, rope: int, latent: int = 32, value: int = 32) -> ModelConfig:
    attention = replace(
        MLA,
        kv_lora_rank=latent,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
    )
    return mla_config(attention=attention, num_nextn_predict_layers=0)


CONFIGS = {
    "all odd": mla_config(num_nextn_predict_layers=0),
    "whole heads of odd parts": mla(nope=26, rope=6),
    "whole parts of odd heads": mla(nope=32, rope=6),
    "odd latents and values": mla(nope=32, rope=32, latent=40, value=20),
    "all whole": mla(nope=32, rope=32),
    "differing layers": replace(LAYERS["all"], num_nextn_predict_layers=0),
    "gqa": gqa_config(),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def model_of(config: ModelConfig) -> Transformer:
    model = tiny_model(config, torch.bfloat16)
    with torch.no_grad():
        model.embed_tokens.weight[BAD] = torch.nan
    return model


class Steps:
    """Steps of a model over one cache, every sequence in a page of its own number."""

    def __init__(self, model: Transformer, form: AttentionPath, dtype: torch.dtype) -> None:
        self.model, self.form = NativeModel(model), form
        self.cache = PagedCache(model.config, num_pages=4, page_size=PAGE_SIZE, dtype=dtype)

    def __call__(self, *sequences: list[int], start: int = 0) -> list[Tensor]:
        """Logits of each sequence's tokens."""
        slices = [
            SequenceSlice(pages=(page,), start=start, length=len(ids), path=self.form)
            for page, ids in enumerate(sequences)
        ]
        batch = AttentionBatch.build(slices, page_size=PAGE_SIZE)
        ids = torch.tensor([token for sequence in sequences for token in sequence])
        logits = self.model.step(ids, batch, self.cache, list(range(len(ids))))[1]
        return list(logits.split([len(sequence) for sequence in sequences]))


@pytest.mark.slow
@every_level
@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@torch.inference_mode()
def test_nan_stays_with_its_sequence(level: str, config: ModelConfig, dtype: torch.dtype) -> None:
    assert level in LEVELS
    model = model_of(config)
    for form in FORMS:
        fresh = Steps(model, form, dtype)
        with thread_count(1):
            (alone,), (next_alone,) = fresh(GOOD), fresh([6], start=5)
        assert alone.isfinite().all() and next_alone.isfinite().all()
        for threads in (1, 3):
            with thread_count(threads):
                check_isolation(Steps(model, form, dtype), alone, next_alone)


def check_isolation(steps: Steps, alone: Tensor, next_alone: Tensor) -> None:
    # A larger step than all that follow, so that nothing writes over what it leaves.
    assert all(logits.isnan().all() for logits in steps([BAD] * 9, [BAD] * 9, [BAD] * 9))
    for _ in range(2):
        assert_same_bits(steps(GOOD)[0], alone)
        assert_same_bits(steps([6], start=5)[0], next_alone)
        together = steps(GOOD, [BAD] * 5, GOOD, [BAD])
        for logits, is_good in zip(together, (True, False, True, False), strict=True):
            if is_good:
                assert_same_bits(logits, alone)
            else:
                assert logits.isnan().all()
        batch_of_three = steps([6], [BAD], [6], start=5)
        assert_same_bits(batch_of_three[0], next_alone)
        assert batch_of_three[1].isnan().all()
        assert_same_bits(batch_of_three[2], next_alone)


def finished(engine: Engine, *prompts: list[int]) -> list[Request]:
    params = TokenSamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return requests


def tokens_of(request: Request) -> list[int]:
    (sequence,) = request.sequences
    assert sequence.finish_reason == "length"
    return sequence.tokens


@every_level
@torch.inference_mode()
def test_a_request_of_nan_fails_alone(level: str) -> None:
    assert level in LEVELS
    model = model_of(CONFIGS["all odd"])

    def new_engine() -> Engine:
        return Engine(ModelRunner(model), context=64, eos_ids=frozenset(), speculates=False)

    with thread_count(1):
        (request,) = finished(new_engine(), GOOD)
    expected = tokens_of(request)
    for threads in (1, 3):
        with thread_count(threads):
            engine = new_engine()
            (bad,) = finished(engine, [3, BAD])
            assert [sequence.finish_reason for sequence in bad.sequences] == ["error"]
            first, bad, last = finished(engine, GOOD, [3, 5, BAD, 6], GOOD)
            assert [sequence.finish_reason for sequence in bad.sequences] == ["error"]
            (after,) = finished(engine, GOOD)
        assert tokens_of(first) == tokens_of(last) == tokens_of(after) == expected
