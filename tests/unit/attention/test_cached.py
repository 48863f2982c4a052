"""Cached attention equals attention over whole sequences: any chunks, page sizes, page order and
batch.
"""

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.int8_entry import pack_entries, unpack_entries
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.attention.path import AttentionPath, choose_path
from lowlat.config.attention import expansion_break_even
from lowlat.config.model import GQAConfig, MLAConfig
from tests.configs import V3_MLA
from tests.packed_attention import PackedAttention

from .draw import GQA, MLA, config_of

LENGTHS = [17, 1, 5]
ABSORBED, EXPANDED = math.inf, 0.0
"""Lengths beyond which slices are expanded: never, always."""


def mla_inputs(tokens: int) -> dict[str, Tensor]:
    shapes = {"q_nope": (tokens, 3, 5), "q_rope": (tokens, 3, 4), "rows": (tokens, 17)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def up_projections() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 5, 13, dtype=torch.float64), torch.randn(3, 7, 13, dtype=torch.float64)


def gqa_inputs(tokens: int) -> dict[str, Tensor]:
    shapes = {"q": (tokens, 6, 6), "k": (tokens, 2, 6), "v": (tokens, 2, 6)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def new_cache(attention: MLAConfig | GQAConfig, page_size: int) -> PagedCache:
    config = config_of(attention, layers=2)
    # Old rows of other sequences must never be read: NaN would show.
    cache = PagedCache(config, num_pages=61, page_size=page_size, dtype=torch.float64)
    for rows in cache.layers:
        rows.fill_(float("nan"))
    return cache


def page_tables(page_size: int, *, scattered: bool) -> list[tuple[int, ...]]:
    """Pages for each of the sequences LENGTHS."""
    free = list(range(61))
    if scattered:
        random.Random(5).shuffle(free)
    tables = []
    for length in LENGTHS:
        count = -(-length // page_size)
        tables.append(tuple(free[:count]))
        free = free[count:]
    return tables


def steps(seed: int) -> Iterator[list[tuple[int, int, int]]]:
    """Random chunks: per step a list of (sequence, start, length), until all sequences are done."""
    rng = random.Random(seed)
    done = [0] * len(LENGTHS)
    while done != LENGTHS:
        step = []
        for sequence, length in enumerate(LENGTHS):
            count = rng.choice([0, 1, 1, 2, 5, 17])
            count = min(count, length - done[sequence])
            if count:
                step.append((sequence, done[sequence], count))
                done[sequence] += count
        if step:
            yield step


def form_for(length: int, break_even: float) -> AttentionPath:
    return "expanded" if length > break_even else "absorbed"


def chunked(
    call: str,
    cache: PagedCache,
    tables: list[tuple[int, ...]],
    inputs: dict[str, Tensor],
    rest: tuple,
    *,
    seed: int,
    break_even: float,
) -> Tensor:
    """Run all steps and put the outputs back in packed order."""
    offsets = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    out: dict[int, Tensor] = {}
    for step in steps(seed):
        slices = [
            SequenceSlice(pages=tables[s], start=start, length=n, path=form_for(n, break_even))
            for s, start, n in step
        ]
        batch = AttentionBatch.build(slices, page_size=cache.page_size)
        places = [offsets[s] + start + i for s, start, n in step for i in range(n)]
        backend = CachedAttention(cache, batch)
        result = getattr(backend, call)(1, *(x[places] for x in inputs.values()), *rest)
        out.update(zip(places, result, strict=True))
    return torch.stack([out[place] for place in range(sum(LENGTHS))])


@pytest.mark.parametrize("break_even", [ABSORBED, EXPANDED, 2.0])
@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("scattered", [False, True])
def test_mla_in_chunks_equals_whole(page_size: int, scattered: bool, break_even: float) -> None:
    inputs, rest = mla_inputs(sum(LENGTHS)), (*up_projections(), 0.3)
    whole = PackedAttention(LENGTHS).mla(1, *inputs.values(), *rest)
    for seed in range(4):
        cache = new_cache(MLA(), page_size)
        tables = page_tables(page_size, scattered=scattered)
        out = chunked("mla", cache, tables, inputs, rest, seed=seed, break_even=break_even)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-10)
        assert cache.layers[0].isnan().all()


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("scattered", [False, True])
def test_gqa_in_chunks_equals_whole(page_size: int, scattered: bool, window: int | None) -> None:
    inputs, rest = gqa_inputs(sum(LENGTHS)), (0.4, window)
    whole = PackedAttention(LENGTHS).gqa(1, *inputs.values(), *rest)
    for seed in range(4):
        cache = new_cache(GQA(), page_size)
        tables = page_tables(page_size, scattered=scattered)
        out = chunked("gqa", cache, tables, inputs, rest, seed=seed, break_even=0.0)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("break_even", [ABSORBED, EXPANDED, 2.0])
def test_mla_from_int8_entries(break_even: float) -> None:
    """Attention reads the dequantized entries, for any path and chunks."""
    inputs, rest = mla_inputs(sum(LENGTHS)), (*up_projections(), 0.3)
    stored = unpack_entries(pack_entries(inputs["rows"], 13), 17, 13, torch.float64)
    assert (stored - inputs["rows"]).abs().max() > 1e-3
    whole = PackedAttention(LENGTHS).mla(1, *(inputs | {"rows": stored}).values(), *rest)
    cache = PagedCache(config_of(MLA(), layers=2), num_pages=61, page_size=3, dtype=torch.int8)
    tables = page_tables(3, scattered=True)
    out = chunked("mla", cache, tables, inputs, rest, seed=1, break_even=break_even)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-10)


def test_gqa_from_int8_entries() -> None:
    inputs, rest = gqa_inputs(sum(LENGTHS)), (0.4, None)
    rows = torch.cat([inputs["k"].flatten(1), inputs["v"].flatten(1)], dim=1)
    stored = unpack_entries(pack_entries(rows, 24), 24, 24, torch.float64)
    k, v = stored.unflatten(1, (2, 2, 6)).unbind(1)
    whole = PackedAttention(LENGTHS).gqa(1, inputs["q"], k, v, *rest)
    cache = PagedCache(config_of(GQA(), layers=2), num_pages=61, page_size=3, dtype=torch.int8)
    tables = page_tables(3, scattered=True)
    out = chunked("gqa", cache, tables, inputs, rest, seed=1, break_even=0.0)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-10)


def test_gqa_entries_are_keys_then_values() -> None:
    cache = new_cache(GQA(), 3)
    batch = AttentionBatch.build([SequenceSlice(pages=(4,), start=0, length=2)], page_size=3)
    inputs = gqa_inputs(2)
    CachedAttention(cache, batch).gqa(0, *inputs.values(), 1.0, None)
    rows = cache.read(0, (4,), 2, torch.float64)
    assert torch.equal(rows[:, :12], inputs["k"].flatten(1))
    assert torch.equal(rows[:, 12:], inputs["v"].flatten(1))


def test_mla_caches_the_entries_it_is_given() -> None:
    cache = new_cache(MLA(), 3)
    batch = AttentionBatch.build(
        [SequenceSlice(pages=(4, 2), start=0, length=5, path="expanded")], page_size=3
    )
    inputs = mla_inputs(5)
    CachedAttention(cache, batch).mla(0, *inputs.values(), *up_projections(), 1.0)
    assert torch.equal(cache.read(0, (4, 2), 5, torch.float64), inputs["rows"])


def test_break_even_of_deepseek_v3_is_about_170() -> None:
    """512 (128 + 128) / (2 512 + 64 - 128 - 64 - 128) = 170.67 queries per key."""
    assert expansion_break_even([V3_MLA]) == pytest.approx(512 * 256 / 768)
    # With a latent no wider than the heads the absorbed path never costs more.
    no_gain = MLA(kv_lora_rank=4, qk_nope_head_dim=5, v_head_dim=7)
    assert expansion_break_even([no_gain]) == math.inf


@pytest.mark.parametrize(
    ("path", "called"),
    [("decode", "absorbed_mla"), ("absorbed", "absorbed_mla"), ("expanded", "expanded_mla")],
)
def test_the_slice_selects_the_path(
    path: AttentionPath, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for name in ("absorbed_mla", "expanded_mla"):
        monkeypatch.setattr(
            f"lowlat.attention.cached.{name}",
            lambda q, *rest, name=name, **options: seen.append(name) or q.new_zeros(len(q), 3, 7),
        )
    cache = new_cache(MLA(), 64)
    item = SequenceSlice(pages=(0,), start=0, length=2, path=path)
    backend = CachedAttention(cache, AttentionBatch.build([item], page_size=64))
    backend.mla(0, *mla_inputs(2).values(), *up_projections(), 1.0)
    assert seen == [called]


def test_the_fastest_path_follows_from_length_and_config() -> None:
    """The border of the wide MLA is 512 (128 + 128) / (2 512 + 4 - 128 - 4 - 128) = 170.7."""
    wide = MLA(qk_nope_head_dim=128, v_head_dim=128, kv_lora_rank=512)
    assert choose_path(wide, 170) == "absorbed" and choose_path(wide, 200) == "expanded"
    assert choose_path(GQA(), 32) == "decode" and choose_path(GQA(), 33) == "expanded"
