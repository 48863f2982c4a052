"""Models with sparse attention (DSA) through the native step, as near to fp32 as plain bf16:
indexers of another rotary width than MLA's, entries that tile products read, several splits.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.attention.path import AttentionPath
from lowlat.config.model import IndexerConfig, ModelConfig, RopeConfig
from lowlat.model.native import NativeModel, indexer_obstacle, supports_native
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from tests.lowlat_configs import MLA, YARN, chosen_frequencies, lowlat_config, random_model
from tests.native.inputs import thread_count
from tests.native.test_step import (
    PAGE_SIZE,
    distances,
    every_level,
    native_logits,
    plain_logits,
)
from tests.parameters import slow_except

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

INDEXER = IndexerConfig(index_n_heads=5, index_head_dim=18, index_topk=31, index_rope_head_dim=4)
WIDE = replace(MLA, kv_lora_rank=32, qk_rope_head_dim=14, indexer=INDEXER)
TILES = replace(MLA, kv_lora_rank=96, qk_rope_head_dim=32, indexer=INDEXER)
"""Entries of whole tile steps of 32 channels."""
CONFIGS = {
    "every third frequency": lowlat_config(WIDE),
    "with a query latent": lowlat_config(replace(WIDE, q_lora_rank=11), rope=YARN),
    # an exactly converted GQA model: one rotary key for three groups, no NoPE channels, no norm
    "repeated frequencies": lowlat_config(
        replace(WIDE, qk_nope_head_dim=0, qk_rope_head_dim=12, kv_a_layernorm=False),
        rope=chosen_frequencies(1.0, 0.25, 1.0, 0.25, 1.0, 0.25, interleave=True),
    ),
    "layers": lowlat_config(
        (WIDE, replace(WIDE, kv_lora_rank=13, qk_rope_head_dim=4)),
        rope=(RopeConfig(rope_theta=30.0), RopeConfig(rope_theta=100.0, rope_interleave=True)),
    ),
    "no rotary channels": lowlat_config(
        replace(WIDE, qk_rope_head_dim=0, indexer=replace(INDEXER, index_rope_head_dim=None))
    ),
    "tiles": lowlat_config(TILES),
    "tiles of 20 heads": lowlat_config(replace(TILES, num_attention_heads=20, kv_lora_rank=64)),
    "tiles of rotary keys": lowlat_config(
        replace(TILES, qk_nope_head_dim=0, qk_rope_head_dim=64, kv_a_layernorm=False)
    ),
}


def in_fp32(model: Transformer) -> Transformer:
    exact = Transformer(model.config, dtype=torch.float32).requires_grad_(False)
    exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    return exact


def check_near(ours: Tensor, plain: Tensor, reference: Tensor) -> None:
    own, theirs = distances(ours, reference), distances(plain, reference)
    assert own.median() <= 1.4 * theirs.median() + 1e-4
    assert own.median() < 0.03
    # index scores of rounded queries choose other tokens where they nearly tie, one of 31
    assert own.max() <= 4 * theirs.max() + 1e-3


def check_mixed_steps(name: str) -> None:
    """Contexts of up to 90 tokens, of which 31 are chosen."""
    model = random_model(CONFIGS[name], torch.bfloat16)
    assert supports_native(model)
    exact, compiled = in_fp32(model), NativeModel(model)
    for break_even in (0.0, 2.0, math.inf):
        plain, ours = plain_logits(model, break_even), native_logits(compiled, break_even)
        check_near(ours, plain, plain_logits(exact, break_even))


@pytest.mark.parametrize("name", slow_except(["every third frequency", "tiles"], CONFIGS))
@torch.inference_mode()
def test_mixed_steps(name: str) -> None:
    check_mixed_steps(name)


@pytest.mark.slow
@every_level
@pytest.mark.parametrize("name", ["layers", "tiles of 20 heads"])
@torch.inference_mode()
def test_mixed_steps_at_every_level(name: str, level: str) -> None:
    check_mixed_steps(name)


def batch_of(start: int, length: int, path: AttentionPath) -> AttentionBatch:
    pages = tuple(range(99, 0, -1))
    item = SequenceSlice(pages=pages, start=start, length=length, path=path)
    return AttentionBatch.build([item], page_size=PAGE_SIZE)


def ids_of(config: ModelConfig, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, config.vocab_size, (count,), generator=generator)


def run_plain(model: Transformer, ids: Tensor) -> Tensor:
    dtype = model.embed_tokens.weight.dtype
    cache = PagedCache(model.config, num_pages=100, page_size=PAGE_SIZE, dtype=dtype)
    batch = batch_of(0, len(ids), "expanded")
    return model.logits(model(ids, batch.positions, CachedAttention(cache, batch))).float()


def run_native(model: Transformer, ids: Tensor, cuts: list[int], dtype: torch.dtype) -> Tensor:
    compiled = NativeModel(model)
    cache = PagedCache(model.config, num_pages=100, page_size=PAGE_SIZE, dtype=dtype)
    rows, start = [], 0
    for end in cuts:
        batch = batch_of(start, end - start, "absorbed")
        wanted = list(range(end - start))
        rows.append(compiled.step(ids[start:end], batch, cache, wanted)[1])
        start = end
    return torch.cat(rows)


@pytest.mark.slow
@pytest.mark.parametrize("level", native.levels()[:-1], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@torch.inference_mode()
def test_several_splits(dtype: torch.dtype, level: str) -> None:
    """A choice of 1,057 tokens in two splits: the same bits from interleaved tokens, whose splits
    follow each other, and from few tokens, whose splits run on several threads."""
    indexer = replace(INDEXER, index_topk=1057)
    attention = replace(TILES, num_attention_heads=20, indexer=indexer)
    config = lowlat_config(attention, num_hidden_layers=1, max_position_embeddings=2048)
    model = random_model(config, torch.bfloat16)
    ids = ids_of(config, 1124)
    with thread_count(3):
        ours = run_native(model, ids, [1050, 1058, 1059, 1124], dtype)
    with thread_count(1):
        for cuts in ([1124], [1100, 1101, 1102, 1124]):
            assert torch.equal(run_native(model, ids, cuts, dtype), ours)
    if dtype == torch.bfloat16:
        check_near(ours, run_plain(model, ids), run_plain(in_fp32(model), ids))


def test_unknown_indexers_fall_back() -> None:
    """By the name of the field."""
    odd = replace(WIDE, indexer=replace(INDEXER, index_head_dim=19))
    some = (WIDE, replace(WIDE, indexer=None))
    for attention, field in ((odd, "index_head_dim 19"), (some, "attention.indexer")):
        assert field in str(indexer_obstacle(attention))
        assert not supports_native(random_model(lowlat_config(attention), torch.bfloat16))
    assert indexer_obstacle(WIDE) is indexer_obstacle(MLA) is None
