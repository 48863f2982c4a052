"""Batch invariance of a step: the same bits in any batch, on any KV cache pages and threads.

Regression: a sum whose order follows the batch, the page table or the thread pool; stale data that
a thread reuses from one work item to the next.
"""

import math
from dataclasses import replace

import pytest
import torch

from lowlat.attention.cache import PagedCache
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.attention.path import AttentionPath
from lowlat.config.model import ModelConfig
from lowlat.model.native import NativeModel, supports_native
from lowlat.ops import native
from tests.native.storages import stored_model
from tests.native.test_step import (
    PAGE_SIZE,
    STEPS,
    TABLES,
    drawn_config,
    every_level,
    few_cases,
    form_for,
    ids_of,
    native_logits,
    native_modules,
    new_cache,
    with_modules,
)
from tests.parity.draw import Case

from .inputs import thread_count

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

BREAK_EVENS = (2.0, math.inf)
"""Expanded prefill with single-token decode; multi-token decode with an absorbed chunk."""
STORED = [
    ("bf16", torch.bfloat16),
    ("bf16", torch.int8),
    ("fp8", torch.bfloat16),
    ("int8", torch.bfloat16),
    ("int4", torch.int8),
]
"""Weights and cache."""
every_storage = pytest.mark.parametrize(
    ("storage", "dtype"), STORED, ids=[f"{weights}-{str(dtype)[6:]}" for weights, dtype in STORED]
)


def widened(config: ModelConfig) -> ModelConfig:
    """With work for several threads in every phase: pieces are 32 channels."""
    return replace(config, hidden_size=5 * config.hidden_size)


def alone(
    model: NativeModel, form: AttentionPath, s: int, start: int, length: int, cache: PagedCache
) -> torch.Tensor:
    """Logits of a step of one sequence, whose pages come in order."""
    item = SequenceSlice(pages=tuple(range(len(TABLES[s]))), start=start, length=length, path=form)
    batch = AttentionBatch.build([item], page_size=PAGE_SIZE)
    ids = ids_of(model.config, [(s, start, length)])
    return model.step(ids, batch, cache, list(range(length)))[1]


@pytest.mark.slow
@every_level
@few_cases
@every_storage
@torch.inference_mode()
def test_bits_do_not_depend_on_batch_pages_or_threads(
    case: Case,
    storage: str,
    dtype: torch.dtype,
    level: str,
) -> None:
    plain = stored_model(widened(drawn_config(case)), case.seed, storage)
    assert supports_native(plain)
    model = NativeModel(plain)
    for break_even in BREAK_EVENS:
        with thread_count(3):
            together = native_logits(model, break_even, dtype)
        assert together.isfinite().all()
        caches = [new_cache(model.config, dtype) for _ in TABLES]
        end = 0
        with thread_count(1):
            for step in STEPS:
                for s, start, length in step:
                    own = alone(model, form_for(length, break_even), s, start, length, caches[s])
                    assert torch.equal(own, together[end : end + length])
                    end += length
        assert end == len(together)


@pytest.mark.slow
@every_level
@few_cases
@pytest.mark.parametrize("storage", ["bf16", "int4"])
@torch.inference_mode()
def test_bits_of_modules_do_not_depend_on_batch_or_threads(
    case: Case,
    storage: str,
    level: str,
) -> None:
    """Draft tokens do not depend on the batch."""
    config = widened(with_modules(case, has_copies=False))
    model = NativeModel(stored_model(config, case.seed, storage))
    for break_even in BREAK_EVENS:
        with thread_count(3):
            together = native_modules(model, break_even)
        # A row of logits belongs to (step, depth, sequence); one sequence's steps come alone.
        place, where = 0, {}
        for number, step in enumerate(STEPS):
            for depth in range(2):
                for s, _, length in step:
                    where[number, depth, s] = slice(place, place + length)
                    place += length
        assert place == len(together)
        for s in range(len(TABLES)):
            own = [(n, item) for n, step in enumerate(STEPS) for item in step if item[0] == s]
            with thread_count(1):
                apart = native_modules(model, break_even, [(item,) for _, item in own])
            expected = [together[where[number, depth, s]] for number, _ in own for depth in (0, 1)]
            assert torch.equal(apart, torch.cat(expected))
