"""LoRA adapters in the native step: mixtures of adapters in one batch against PyTorch; bits depend
neither on the other sequences nor on which other adapters are loaded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowlat.attention.cached import CachedAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.attention.path import AttentionPath
from lowlat.model.lora import LowRankUpdate, add_adapters
from lowlat.model.native import NativeModel, supports_native
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from tests.lora import ATTENTION, drawn_updates
from tests.parity.draw import Case

from .inputs import thread_count
from .storages import stored_model
from .test_step import (
    PAGE_SIZE,
    STEPS,
    TABLES,
    distances,
    drawn_config,
    every_level,
    few_cases,
    form_for,
    ids_of,
    new_cache,
    random_model,
)

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

BREAK_EVENS = (0.0, 2.0, math.inf)
OF_SEQUENCE = (2, 0, 1)
"""lora_int_id of each sequence of STEPS."""
Adapter = Mapping[str, LowRankUpdate]


def adapters_for(model: Transformer) -> list[Adapter]:
    """Of all projections with a rank that is no multiple of 8, of attention, and of few."""
    return [
        drawn_updates(model, rank=11, seed=1),
        drawn_updates(model, rank=8, seed=2, names=ATTENTION),
        drawn_updates(model, rank=3, seed=3, names=("o_proj", "up_proj")),
    ]


def slices(step: Sequence[tuple[int, int, int]], break_even: float, of: Sequence[int]):
    return [
        SequenceSlice(
            pages=TABLES[s],
            start=start,
            length=n,
            path=form_for(n, break_even),
            lora_int_id=of[s],
        )
        for s, start, n in step
    ]


def native_rows(
    model: NativeModel, break_even: float, of: Sequence[int], only: int | None = None
) -> list[Tensor]:
    """Logits of each slice of STEPS, or of the sequence `only` in steps of its own."""
    cache, rows = new_cache(model.config, torch.bfloat16), []
    for step in STEPS:
        own = [item for item in step if only in (None, item[0])]
        if not own:
            continue
        batch = AttentionBatch.build(slices(own, break_even, of), page_size=PAGE_SIZE)
        ids = ids_of(model.config, own)
        logits = model.step(ids, batch, cache, list(range(len(ids))))[1]
        rows += logits.split([n for _, _, n in own])
    return rows


def plain_rows(model: Transformer, adapters: list[Adapter], break_even: float) -> list[Tensor]:
    """The same in PyTorch, which computes one adapter at a time; in the order of STEPS."""
    selected = add_adapters(model, adapters)
    found: dict[tuple[int, int], Tensor] = {}
    for s, number in enumerate(OF_SEQUENCE):
        selected.lora_int_id = number
        cache = new_cache(model.config, model.embed_tokens.weight.dtype)
        for item in [item for step in STEPS for item in step if item[0] == s]:
            batch = AttentionBatch.build(
                slices([item], break_even, OF_SEQUENCE), page_size=PAGE_SIZE
            )
            ids = ids_of(model.config, [item])
            hidden = model(ids, batch.positions, CachedAttention(cache, batch))
            found[s, item[1]] = model.logits(hidden).float()
    return [found[s, start] for step in STEPS for s, start, _ in step]


def with_adapters(model: Transformer, adapters: list[Adapter]) -> NativeModel:
    add_adapters(model, adapters)
    assert supports_native(model)
    return NativeModel(model)


@every_level
@few_cases
@torch.inference_mode()
def test_logits_are_as_near_to_fp32_as_plain_bf16(case: Case, level: str) -> None:
    config = drawn_config(case)
    model = random_model(config, case.seed)
    adapters = adapters_for(model)
    exact = Transformer(config, dtype=torch.float32)
    exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    plain_model = random_model(config, case.seed)
    compiled = with_adapters(model, adapters)
    for break_even in BREAK_EVENS:
        reference = torch.cat(plain_rows(exact, adapters, break_even))
        plain = distances(torch.cat(plain_rows(plain_model, adapters, break_even)), reference)
        found = torch.cat(native_rows(compiled, break_even, OF_SEQUENCE))
        ours = distances(found, reference)
        assert ours.median() <= 1.4 * plain.median()
        assert ours.median() < 0.03
        base = torch.cat(native_rows(compiled, break_even, (0, 0, 0)))
        assert distances(base, reference).median() > 0.2  # the updates count


@every_level
@few_cases
@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "int4"])
@torch.inference_mode()
def test_bits_do_not_depend_on_other_sequences_and_adapters(
    case: Case, storage: str, level: str
) -> None:
    """Alone means: the only sequence, on one thread, of a model with this adapter only."""
    config = replace(drawn_config(case), hidden_size=5 * drawn_config(case).hidden_size)

    def fresh() -> Transformer:
        torch.manual_seed(case.seed)  # of quantized weights
        return stored_model(config, case.seed, storage)

    adapters = adapters_for(fresh())
    mixed = with_adapters(fresh(), adapters)
    own = [with_adapters(fresh(), [adapters[n - 1]] if n else []) for n in OF_SEQUENCE]
    places = [item[0] for step in STEPS for item in step]
    for break_even in BREAK_EVENS:
        with thread_count(3):
            together = native_rows(mixed, break_even, OF_SEQUENCE)
        for s, number in enumerate(OF_SEQUENCE):
            with thread_count(1):
                alone = native_rows(own[s], break_even, (int(number > 0),) * 3, only=s)
            expected = [rows for rows, place in zip(together, places, strict=True) if place == s]
            assert torch.equal(torch.cat(alone), torch.cat(expected))


@every_level
@few_cases
@pytest.mark.parametrize("form", ["decode", "absorbed", "expanded"])
@torch.inference_mode()
def test_bits_do_not_depend_on_how_a_text_is_cut(
    case: Case, level: str, form: AttentionPath
) -> None:
    """Chunked prefill, the prefix cache, preemption and speculation rest on this."""
    config = drawn_config(case)
    drawn = random_model(config, case.seed)
    model = with_adapters(drawn, adapters_for(drawn))
    pages, length = tuple(range(7, 0, -1)), 90
    ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(2))

    def read(cuts: list[int]) -> tuple[Tensor, Tensor]:
        cache, rows, start = new_cache(config, torch.bfloat16), [], 0
        for end in cuts:
            item = SequenceSlice(
                pages=pages, start=start, length=end - start, path=form, lora_int_id=1
            )
            batch = AttentionBatch.build([item], page_size=PAGE_SIZE)
            rows.append(model.step(ids[start:end], batch, cache, list(range(end - start)))[1])
            start = end
        return torch.cat(rows), torch.cat([each.flatten() for each in cache.tensors])

    logits, entries = read([length])
    for cuts in ([*range(1, length + 1)], [1, 34, 61, length]):
        own_logits, own_entries = read(cuts)
        assert torch.equal(own_entries, entries)
        assert torch.equal(own_logits, logits)


@torch.inference_mode()
def test_unusable_updates_are_refused() -> None:
    """Regression: kernels that read beyond an update's end."""
    module = native.module()
    weight = module.Matrix.bf16(torch.zeros(40, 50, dtype=torch.bfloat16))

    def make(a: tuple[int, int], b: tuple[int, int], dtype: torch.dtype = torch.bfloat16):
        update = module.LowRank.make(torch.zeros(a, dtype=dtype), torch.zeros(b, dtype=dtype))
        return module.Projection.make(weight, None, updates=[None, update])

    make((3, 64), (3, 96))
    for a, b in (((3, 60), (3, 96)), ((3, 64), (3, 64)), ((3, 32), (3, 96)), ((3, 64), (4, 96))):
        with pytest.raises((ValueError, TypeError)):
            make(a, b)
    with pytest.raises((ValueError, TypeError)):
        make((3, 64), (3, 96), torch.float32)
