"""The whole model against itself: cached, chunked, paged and batched in any way, it is one
function.
"""

import math
import random

import pytest
import torch
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.config.model import ModelConfig
from lowlat.model.moe import Gate
from lowlat.model.transformer import Transformer
from lowlat.ops.routing import Routing
from tests.packed_attention import PackedAttention

from .draw import gqa_config, mla_config, random_model

CONFIGS = {"mla": mla_config(num_nextn_predict_layers=1), "gqa": gqa_config()}
SEQUENCES = [19, 1, 6]


def ids_of(length: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 41, (length,), generator=torch.Generator().manual_seed(seed))


def alone(model: Transformer, ids: Tensor) -> Tensor:
    backend = PackedAttention([len(ids)])
    return model.logits(model(ids, backend.positions(), backend))


def cached(
    model: Transformer,
    ids: Tensor,
    chunks: list[int],
    *,
    page_size: int,
    break_even: float,
    seed: int = 0,
) -> Tensor:
    """Logits of one sequence computed in chunks over scattered pages."""
    count = -(-len(ids) // page_size)
    pages = list(range(count + 5))
    random.Random(seed).shuffle(pages)
    cache = PagedCache(
        model.config,
        num_pages=count + 5,
        page_size=page_size,
        dtype=model.embed_tokens.weight.dtype,
    )
    outputs, start = [], 0
    for length in chunks:
        form = "expanded" if length > break_even else "absorbed"
        item = SequenceSlice(pages=tuple(pages[:count]), start=start, length=length, path=form)
        batch = AttentionBatch.build([item], page_size=page_size)
        backend = CachedAttention(cache, batch)
        outputs.append(model.logits(model(ids[start : start + length], batch.positions, backend)))
        start += length
    return torch.cat(outputs)


def random_chunks(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    chunks: list[int] = []
    while sum(chunks) < length:
        chunks.append(min(rng.choice([1, 1, 2, 3, 7, 11]), length - sum(chunks)))
    return chunks


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("break_even", [math.inf, 0.0, 2.0])
def test_cached_and_chunked_equal_uncached(name: str, page_size: int, break_even: float) -> None:
    """Regression: a cached key that is rotated otherwise than the query, or normalised twice."""
    model = random_model(CONFIGS[name])
    ids = ids_of(23)
    whole = alone(model, ids)
    for chunks in ([23], [1] * 23, random_chunks(23, 1), random_chunks(23, 2)):
        out = cached(model, ids, chunks, page_size=page_size, break_even=break_even)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_several_sequences_equal_each_alone(name: str) -> None:
    model = random_model(CONFIGS[name])
    each = [ids_of(length, seed) for seed, length in enumerate(SEQUENCES)]
    expected = torch.cat([alone(model, ids) for ids in each])
    packed = PackedAttention(SEQUENCES)
    together = model.logits(model(torch.cat(each), packed.positions(), packed))
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-10)

    tables = [(9, 1, 4, 0, 11), (3,), (8, 2)]
    cache = PagedCache(model.config, num_pages=12, page_size=4, dtype=torch.float64)
    items = [
        SequenceSlice(pages=pages, start=0, length=length, path="expanded")
        for pages, length in zip(tables, SEQUENCES, strict=True)
    ]
    batch = AttentionBatch.build(items, page_size=4)
    backend = CachedAttention(cache, batch)
    batched = model.logits(model(torch.cat(each), batch.positions, backend))
    torch.testing.assert_close(batched, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_in_a_batch_with_decoding(name: str) -> None:
    """One step holds a decoding sequence and another one's prompt."""
    model = random_model(CONFIGS[name])
    long, prompt = ids_of(9, 1), ids_of(6, 2)
    cache = PagedCache(model.config, num_pages=9, page_size=3, dtype=torch.float64)

    def step(ids: Tensor, items: list[SequenceSlice]) -> Tensor:
        batch = AttentionBatch.build(items, page_size=3)
        backend = CachedAttention(cache, batch)
        return model.logits(model(ids, batch.positions, backend))

    step(long[:8], [SequenceSlice(pages=(6, 2, 4), start=0, length=8, path="expanded")])
    mixed = step(
        torch.cat([long[8:], prompt]),
        [
            SequenceSlice(pages=(6, 2, 4), start=8, length=1),
            SequenceSlice(pages=(0, 8), start=0, length=6, path="expanded"),
        ],
    )
    torch.testing.assert_close(mixed[:1], alone(model, long)[8:], rtol=0, atol=1e-10)
    torch.testing.assert_close(mixed[1:], alone(model, prompt), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_positions_reach_the_rotation(name: str) -> None:
    """A shift of all positions changes nothing, stretched positions do; position 0 alone would not
    show it.
    """
    model, ids = random_model(CONFIGS[name]), ids_of(9)
    backend, places = PackedAttention([9]), torch.arange(9)
    near = model.logits(model(ids, places, backend))
    shifted = model.logits(model(ids, places + 1000, backend))
    stretched = model.logits(model(ids, places * 7, backend))
    torch.testing.assert_close(shifted, near, rtol=0, atol=1e-3)
    assert (stretched - near).abs().max() > 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_sees_no_later_token(name: str) -> None:
    model, ids = random_model(CONFIGS[name]), ids_of(11)
    changed = ids.clone()
    changed[7] = (ids[7] + 1) % 41
    before, after = alone(model, ids), alone(model, changed)
    torch.testing.assert_close(after[:7], before[:7], rtol=0, atol=1e-12)
    assert (after[7:] - before[7:]).abs().amax(dim=1).min() > 1e-6


def test_window_hides_older_tokens() -> None:
    """With windows of 4 on both layers, token 10 reaches back 6 places and no further."""
    model = random_model(gqa_config(sliding_window_layers=None))
    ids = ids_of(11)
    for changed_place, reached in [(3, False), (4, True)]:
        changed = ids.clone()
        changed[changed_place] = (ids[changed_place] + 1) % 41
        moved = (alone(model, changed)[10] - alone(model, ids)[10]).abs().max() > 1e-9
        assert moved == reached


def test_heads_tied_and_not() -> None:
    tied = random_model(gqa_config())
    assert tied.lm_head is None
    hidden = torch.randn(3, 23).double()
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embed_tokens.weight.T)
    own = random_model(gqa_config(tie_word_embeddings=False))
    assert own.lm_head is not None
    torch.testing.assert_close(own.logits(hidden), hidden @ own.lm_head.weight.T)


def test_logits_of_narrow_models_are_fp32() -> None:
    for config in CONFIGS.values():
        model = random_model(config, dtype=torch.bfloat16)
        logits = alone(model, ids_of(5))
        assert logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_builds_on_meta(config: ModelConfig) -> None:
    """Nothing is allocated, and the rotary tables, which no checkpoint fills, are real all the
    same.
    """
    with torch.device("meta"):
        model = Transformer(config, dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.rotary.inverse.is_meta
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in Transformer(config).named_parameters()
    }


def watch_experts(model: Transformer) -> set[str]:
    """Filled with the names of the experts that are chosen from here on."""
    chosen: set[str] = set()

    def hook(prefix: str, routing: Routing) -> None:
        chosen.update(f"{prefix}experts.{expert}" for expert in routing.experts.unique().tolist())

    for name, module in model.named_modules():
        if isinstance(module, Gate):
            prefix = name.removesuffix("gate")
            module.register_forward_hook(lambda *call, prefix=prefix: hook(prefix, call[2]))
    return chosen


def test_training_gradients_are_finite_and_reach_every_weight() -> None:
    """Of the experts, those of the chosen and no others."""
    for config in (mla_config(), gqa_config()):
        model = random_model(config).requires_grad_(True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("e_score_correction_bias" not in name)
        chosen = watch_experts(model)
        alone(model, ids_of(31)).square().mean().backward()
        for name, parameter in model.named_parameters():
            if "mlp.experts." in name and name.rsplit(".", 2)[0] not in chosen:
                assert parameter.grad is None, name
            elif parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                assert parameter.grad.count_nonzero() > 0, name
