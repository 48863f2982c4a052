"""Sparse attention (DSA) in whole models: dense to the bit up to top-k, and beyond it the same in
every form.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.attention.cache import PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.flash import FlashAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.attention.path import AttentionPath
from lowlat.config.model import IndexerConfig, MLAConfig, ModelConfig
from lowlat.model.mla import MLA
from lowlat.model.transformer import Transformer
from lowlat.ops.rope import apply_rope
from tests import configs
from tests.packed_attention import PackedAttention

from .draw import mla_config, random_model

TOKENS, TOPK = 29, 7
INDEXER = IndexerConfig(index_n_heads=3, index_head_dim=9, index_topk=TOPK)
SPARSE = replace(configs.MLA, indexer=INDEXER)
SHARED = replace(SPARSE, indexer=replace(INDEXER, is_shared=True))
SHARING = (SPARSE, SHARED, SPARSE, SHARED)
PATHS: tuple[AttentionPath, ...] = ("decode", "absorbed", "expanded")


def sparse_config(attention: Any = SPARSE, **changes: Any) -> ModelConfig:
    layers = len(attention) if isinstance(attention, tuple) else 2
    return mla_config(attention=attention, num_hidden_layers=layers, **changes)


def topk_of(config: ModelConfig, topk: int) -> ModelConfig:
    layers = []
    for layer in range(config.num_hidden_layers):
        attention = config.attention_of(layer)
        assert isinstance(attention, MLAConfig) and attention.indexer is not None
        layers.append(replace(attention, indexer=replace(attention.indexer, index_topk=topk)))
    return replace(config, attention=tuple(layers))


def with_config(model: Transformer, config: ModelConfig) -> Transformer:
    """Another model with the same weights, as far as it has them."""
    other = Transformer(config, dtype=model.embed_tokens.dtype).eval().requires_grad_(False)
    known = other.state_dict()
    weights = {name: value for name, value in model.state_dict().items() if name in known}
    other.load_state_dict(weights, assign=True)
    return other


def dense(model: Transformer) -> Transformer:
    config = model.config
    layers = [config.attention_of(layer) for layer in range(config.num_hidden_layers)]
    attention = tuple(replace(a, indexer=None) for a in layers if isinstance(a, MLAConfig))
    return with_config(model, replace(config, attention=attention))


def ids_of(tokens: int = TOKENS) -> Tensor:
    return torch.arange(tokens) * 17 % 41


def run(model: Transformer, backend: AttentionBackend, ids: Tensor, start: int = 0) -> Tensor:
    positions = torch.arange(start, start + len(ids))
    return model.logits(model(ids, positions, backend))


def cached(
    model: Transformer,
    ids: Tensor,
    lengths: list[int],
    path: AttentionPath,
    dtype: torch.dtype | None = None,
    page_size: int = 3,
) -> Tensor:
    """Chunks of the given lengths over scattered pages."""
    pages = list(range(-(-len(ids) // page_size) + 5))
    random.Random(3).shuffle(pages)
    kind = dtype or model.embed_tokens.dtype
    cache = PagedCache(model.config, num_pages=len(pages), page_size=page_size, dtype=kind)
    outputs, start = [], 0
    for length in lengths:
        item = SequenceSlice(pages=tuple(pages), start=start, length=length, path=path)
        backend = CachedAttention(cache, AttentionBatch.build([item], page_size=page_size))
        outputs.append(run(model, backend, ids[start : start + length], start))
        start += length
    assert start == len(ids)
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", [SPARSE, SHARING], ids=["full", "sharing"])
@pytest.mark.parametrize("topk", [TOKENS, 10 * TOKENS])
def test_up_to_topk_tokens_attention_is_dense_to_the_bit(
    topk: int, attention: Any, dtype: torch.dtype
) -> None:
    """Packed, in one kernel call, and cached on every path, in one piece and in chunks."""
    model = random_model(topk_of(sparse_config(attention), topk), dtype=dtype)
    reference, ids = dense(model), ids_of()
    for backend in (PackedAttention, FlashAttention):
        pieces = [11, 1, TOKENS - 12]
        found, wanted = (run(one, backend(pieces), ids) for one in (model, reference))
        assert torch.equal(found, wanted)
    for path in PATHS:
        for lengths in ([TOKENS], [5, 1, 11, TOKENS - 17]):
            found, wanted = (cached(one, ids, lengths, path) for one in (model, reference))
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("attention", [SPARSE, SHARING], ids=["full", "sharing"])
def test_every_form_beyond_topk(attention: Any) -> None:
    """fp64, in which no rounding changes a choice: whole, packed, and cached in any chunks."""
    model, ids = random_model(sparse_config(attention)), ids_of()
    whole = run(model, PackedAttention([TOKENS]), ids)
    torch.testing.assert_close(run(model, FlashAttention([TOKENS]), ids), whole, rtol=0, atol=1e-9)
    for path in PATHS:
        for lengths in ([TOKENS], [1] * TOKENS, [6, 1, 1, 13, TOKENS - 21]):
            found = cached(model, ids, lengths, path, page_size=len(lengths))
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)
    difference = (whole - run(dense(model), PackedAttention([TOKENS]), ids)).abs()
    assert difference[:TOPK].max() < 1e-12 and difference[TOPK:].max() > 1e-3


def test_packed_sequences_choose_among_their_own_tokens() -> None:
    model, ids = random_model(sparse_config(SHARING)), ids_of()
    lengths = [13, 3, 13]
    for kind in (PackedAttention, FlashAttention):
        backend = kind(lengths)
        found = model.logits(model(ids, backend.positions(), backend))
        first = 0
        for length, part in zip(lengths, found.split(lengths), strict=True):
            alone = run(model, kind([length]), ids[first : first + length])
            torch.testing.assert_close(part, alone, rtol=0, atol=1e-10)
            first += length


def test_sequences_of_a_batch_choose_among_their_own_tokens() -> None:
    """Two sequences decode in one step with pages of their own."""
    model, ids = random_model(sparse_config(SHARING)), ids_of()
    cache = PagedCache(model.config, num_pages=30, page_size=2, dtype=torch.float64)
    tables = (tuple(range(0, 30, 2)), tuple(range(1, 30, 2)))
    starts, outputs = [0, 0], ([], [])
    for lengths in ([9, 4], [1, 9], [3, 1], [5, 7]):
        items = [
            SequenceSlice(pages=pages, start=start, length=length, path="absorbed")
            for pages, start, length in zip(tables, starts, lengths, strict=True)
        ]
        batch = AttentionBatch.build(items, page_size=2)
        given = [ids[s : s + n] for s, n in zip(starts, lengths, strict=True)]
        given[1] = (given[1] + 1) % 41
        hidden = model(torch.cat(given), batch.positions, CachedAttention(cache, batch))
        for own, part in zip(outputs, model.logits(hidden).split(lengths), strict=True):
            own.append(part)
        starts = [s + n for s, n in zip(starts, lengths, strict=True)]
    for own, count, shift in zip(outputs, starts, (0, 1), strict=True):
        alone = run(model, PackedAttention([count]), (ids[:count] + shift) % 41)
        torch.testing.assert_close(torch.cat(own), alone, rtol=0, atol=1e-9)


def test_layers_that_share_attend_to_the_choice_before_them() -> None:
    """A shared layer has no indexer and no index key; whose choice it takes is visible."""
    model, ids = random_model(sparse_config(SHARING)), ids_of()
    modules = [layer.self_attn for layer in model.layers]
    assert [isinstance(m, MLA) and m.indexer is not None for m in modules] == [True, False] * 2
    cache = PagedCache(model.config, num_pages=1, dtype=torch.float64)
    assert cache.index_dims == [9, 0] * 2 and cache.entry_dims == [13 + 6] * 4
    found = run(model, PackedAttention([TOKENS]), ids)
    wrong = with_config(model, sparse_config((SPARSE, SHARED, SHARED, SHARED)))
    other = run(wrong, PackedAttention([TOKENS]), ids)
    assert (other - found).abs().max() > 1e-3


def test_an_int8_cache_holds_latent_and_index_key() -> None:
    """Entries [k_I ; c_t] in int8, k_R in bf16; the choice is made from the stored keys."""
    wide = replace(SPARSE, kv_lora_rank=64, indexer=replace(INDEXER, index_head_dim=64))
    model, ids = random_model(sparse_config(wide, moe=None)), ids_of()
    assert wide.quantized_dim == 128 and wide.entry_dim == 134
    whole = run(model, PackedAttention([TOKENS]), ids)
    found = cached(model, ids, [11, TOKENS - 11], "absorbed", dtype=torch.int8)
    again = cached(model, ids, [3, 20, TOKENS - 23], "absorbed", dtype=torch.int8)
    torch.testing.assert_close(found, again, rtol=0, atol=1e-9)
    cosine = torch.nn.functional.cosine_similarity(found, whole, dim=-1)
    assert cosine.median() > 0.99 and not torch.equal(found, whole)


def test_a_served_context_up_to_topk_is_dense() -> None:
    """Without indexers: entries have no index key, and the native kernels can run the model."""
    model, ids = random_model(sparse_config(SHARING)), ids_of(TOPK)
    stored = model.config
    wanted = run(model, PackedAttention([TOPK]), ids)
    model.set_context(TOPK)
    assert not model.config.is_sparse and model.stored_config == stored
    assert [model.config.attention_of(layer).entry_dim for layer in range(4)] == [19] * 4
    assert torch.equal(run(model, PackedAttention([TOPK]), ids), wanted)
    assert cached(model, ids, [TOPK], "absorbed").shape == wanted.shape
    model.set_context(TOPK + 1)
    assert model.config == stored


def test_mtp_modules_have_an_indexer_of_their_own() -> None:
    """Also behind a last layer that shares a choice."""
    config = sparse_config(SHARING, num_nextn_predict_layers=2)
    model, ids = random_model(config), ids_of()
    assert [isinstance(m.block.self_attn.indexer, torch.nn.Module) for m in model.mtp] == [True] * 2
    hidden = model(ids, torch.arange(TOKENS), PackedAttention([TOKENS]))

    def module(backend: AttentionBackend, model: Transformer = model) -> Tensor:
        return model.mtp_hidden(0, hidden[:-1], ids[1:], torch.arange(TOKENS - 1), backend)

    found = module(PackedAttention([TOKENS - 1]))
    pages = tuple(range(15))
    cache = PagedCache(config, num_pages=15, page_size=2, dtype=torch.float64)
    item = SequenceSlice(pages=pages, start=0, length=TOKENS - 1, path="absorbed")
    batch = AttentionBatch.build([item], page_size=2)
    torch.testing.assert_close(module(CachedAttention(cache, batch)), found, rtol=0, atol=1e-9)
    other = module(PackedAttention([TOKENS - 1]), dense(model))
    assert (other - found)[TOPK:].abs().max() > 1e-3


@pytest.mark.parametrize("interleave", [False, True])
def test_the_choice_by_hand(interleave: bool) -> None:
    """A layer's attention from its weights alone, with all keys, values and a mask."""
    indexer = replace(INDEXER, rope_interleave=interleave)
    config = sparse_config(replace(SPARSE, indexer=indexer))
    model = random_model(config)
    module, x = model.layers[0].self_attn, torch.randn(TOKENS, 23).double()
    assert isinstance(module, MLA) and module.indexer is not None
    table = model.rotary.of(0, model.rotary(torch.arange(TOKENS)))
    found = module(x, table, PackedAttention([TOKENS]))
    own = module.indexer
    latent = module.q_a_layernorm(module.q_a_proj(x))
    q = (latent @ own.wq_b.weight.T).unflatten(-1, (3, 9))
    k = F.layer_norm(x @ own.wk.weight.T, (9,), own.k_norm.weight, own.k_norm.bias, 1e-6)
    q, k = (
        torch.cat([apply_rope(p[..., :6], table, interleave=interleave), p[..., 6:]], -1)
        for p in (q, k[:, None])
    )
    weights = x @ own.weights_proj.weight.T * 3**-0.5
    products = torch.einsum("qhd,kd->hqk", q, k[:, 0]).relu() * 9**-0.5
    scores = torch.einsum("qh,hqk->qk", weights, products)
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -torch.inf)
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :TOPK]
    mask = torch.ones_like(later).scatter(1, chosen, False)
    q_nope, q_rope = module.queries(x, table)
    entries = module.entries(x, table)[:, 9:]
    w_uk, w_uv = module.up_projections(torch.float64)
    k_nope = torch.einsum("kc,hnc->khn", entries[:, :13], w_uk)
    dots = torch.einsum("qhn,khn->hqk", q_nope, k_nope)
    dots = (dots + torch.einsum("qhr,kr->hqk", q_rope, entries[:, 13:])) * module.scale
    probabilities = dots.masked_fill(mask | later, -torch.inf).softmax(-1)
    values = torch.einsum("kc,hvc->khv", entries[:, :13], w_uv)
    out = torch.einsum("hqk,khv->qhv", probabilities, values).flatten(1)
    torch.testing.assert_close(found, out @ module.o_proj.weight.T, rtol=0, atol=1e-9)
