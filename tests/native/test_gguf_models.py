"""Models in GGUF blocks: a step over kept blocks against one over their values in bf16."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from lowlat.attention.cache import PagedCache
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.checkpoint import stored_blocks
from lowlat.checkpoint.load import load_model
from lowlat.cli.info import info
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig
from lowlat.model.linear import Embedding, Linear
from lowlat.model.native import NativeModel, supports_native, weight_bytes
from lowlat.model.transformer import Transformer
from lowlat.ops import gguf_blocks, native
from tests.unit.checkpoint.builders import gqa, mla
from tests.unit.checkpoint.gguf_files import write_gguf
from tests.unit.checkpoint.test_packing import Counting

from .inputs import assert_same_bits, thread_count
from .test_step import (
    PAGE_SIZE,
    STEPS,
    TABLES,
    distances,
    every_level,
    form_for,
    ids_of,
    native_logits,
    plain_logits,
    random_model,
)

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

BREAK_EVENS = (2.0, math.inf)
"""Expanded prefill with single-token decode; multi-token decode with an absorbed chunk."""


def latent_config() -> ModelConfig:
    """MLA and experts whose rows are whole blocks."""
    base = mla("deepseek_v3")
    attention = MLAConfig(
        num_attention_heads=3,
        kv_lora_rank=64,
        q_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=6,
        v_head_dim=32,
    )
    assert base.moe is not None
    moe = replace(base.moe, moe_intermediate_size=32)
    return replace(base, attention=attention, moe=moe, hidden_size=96, intermediate_size=64)


def grouped_config() -> ModelConfig:
    """GQA with tied embeddings, whose q and k rows are permuted in files."""
    base = gqa("llama", tie_word_embeddings=True)
    attention = GQAConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    return replace(base, attention=attention, hidden_size=96, intermediate_size=64)


CONFIGS = {"mla": latent_config(), "gqa": grouped_config()}
every_config = pytest.mark.parametrize("family", CONFIGS)
KINDS = [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1]


def gguf_of(folder: Path, family: str, kind: Kind, *, split: bool = False) -> Path:
    config = CONFIGS[family]
    drawn = random_model(config, 3).state_dict()
    return write_gguf(folder / "m.gguf", config, drawn, kind=kind, split_kv_b=split)


def modules_in_blocks(model: Transformer) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear | Embedding) and module.gguf_type is not None
    ]


@every_config
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [False, True], ids=["joined", "split"])
def test_loading_keeps_blocks(tmp_path: Path, family: str, kind: Kind, split: bool) -> None:
    """Values are the file's, all projections and the embedding stay packed, and memory is the
    file's size; other dtypes expand."""
    if split and family == "gqa":
        pytest.skip("GQA has no up-projection")
    path = gguf_of(tmp_path, family, kind, split=split)
    kept = load_model(path, dtype="auto", keeps_blocks=True).model
    dense = load_model(path, dtype="bf16").model
    names = [name for name, part in dense.named_modules() if isinstance(part, Linear | Embedding)]
    assert modules_in_blocks(kept) == names and modules_in_blocks(dense) == []
    for name in names:
        own, plain = kept.get_submodule(name), dense.get_submodule(name)
        assert isinstance(own, Linear | Embedding) and isinstance(plain, Linear | Embedding)
        assert_same_bits(own.dense_weight(torch.bfloat16), plain.weight)
    assert weight_bytes(kept) <= 1.05 * path.stat().st_size
    assert supports_native(kept)


@pytest.mark.parametrize("split", [False, True], ids=["joined", "split"])
def test_progress_counts_blocks(tmp_path: Path, split: bool) -> None:
    path = gguf_of(tmp_path, "mla", Kind.Q8_0, split=split)
    progress = Counting()
    kept = load_model(path, keeps_blocks=True, progress=progress).model
    assert progress.done == progress.total >= 0.99 * weight_bytes(kept)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0])
def test_interleaving_needs_memory_for_all_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Interleaved rows are copies, which unlike views of the file cannot be dropped. Weights that
    are not interleaved count, too."""
    if not gguf_blocks.can_interleave(int(kind)):
        pytest.skip("nothing is interleaved on this machine")
    path = gguf_of(tmp_path, "mla", kind, split=True)

    def load(memory: float) -> Transformer:
        monkeypatch.setattr(stored_blocks, "is_larger_than_memory", lambda size: size > memory)
        return load_model(path, keeps_blocks=True).model

    def has_copies(model: Transformer) -> bool:
        parts = [part for part in model.modules() if isinstance(part, Linear | Embedding)]
        return any(part.is_interleaved for part in parts)

    views = load(0)
    assert not has_copies(views)
    needed = weight_bytes(views)
    assert not has_copies(load(0.98 * needed))
    assert has_copies(load(1.4 * needed))


@every_level
@every_config
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [False, True], ids=["joined", "split"])
@torch.inference_mode()
def test_logits(tmp_path: Path, level: str, family: str, kind: Kind, split: bool) -> None:
    """Prefill has the bits of bf16 weights; decode differs by the rounding of activations."""
    if split and family == "gqa":
        pytest.skip("GQA has no up-projection")
    path = gguf_of(tmp_path, family, kind, split=split)
    kept = load_model(path, dtype="bf16", keeps_blocks=True).model
    dense = load_model(path, dtype="bf16").model
    exact = load_model(path, dtype="fp32").model
    for break_even in BREAK_EVENS:
        reference = plain_logits(exact, break_even)
        plain = distances(native_logits(NativeModel(dense), break_even), reference)
        ours = distances(native_logits(NativeModel(kept), break_even), reference)
        assert ours.median() <= 1.4 * plain.median()
    prefill = [(0, 0, 80)]
    for path_of_chunk in ("expanded", "absorbed"):
        found = [one_step(NativeModel(model), prefill, path_of_chunk) for model in (kept, dense)]
        assert_same_bits(*found)


@pytest.mark.parametrize("value_dim", [24, 32])
@pytest.mark.parametrize("split", [False, True], ids=["joined", "split"])
@torch.inference_mode()
def test_heads_are_interleaved_by_whole_tiles(tmp_path: Path, split: bool, value_dim: int) -> None:
    """Each head is a part of its matrix; 24 rows of a head would begin inside a tile of 16."""
    base = CONFIGS["mla"]
    assert isinstance(base.attention, MLAConfig)
    dims = replace(base.attention, num_attention_heads=4, v_head_dim=value_dim)
    config = replace(base, attention=dims)
    drawn = random_model(config, 3).state_dict()
    path = write_gguf(tmp_path / "m.gguf", config, drawn, kind=Kind.Q4_0, split_kv_b=split)
    kept = load_model(path, dtype="bf16", keeps_blocks=True).model
    fits = gguf_blocks.can_interleave(int(Kind.Q4_0))
    for name, part in kept.named_modules():
        if isinstance(part, Linear) and name.endswith("kv_b_proj"):
            assert part.is_interleaved == (fits and value_dim == 32)
            assert part.keys_interleaved == (fits and split)
    dense = load_model(path, dtype="bf16").model
    for path_of_chunk in ("expanded", "absorbed"):
        step = [(0, 0, 80)]
        found = [one_step(NativeModel(model), step, path_of_chunk) for model in (kept, dense)]
        assert_same_bits(*found)


def one_step(model: NativeModel, step: list[tuple[int, int, int]], form: str) -> torch.Tensor:
    cache = PagedCache(model.config, num_pages=48, page_size=PAGE_SIZE, dtype=torch.bfloat16)
    slices = [
        SequenceSlice(pages=TABLES[s], start=start, length=n, path=form)  # pyright: ignore
        for s, start, n in step
    ]
    ids = ids_of(model.config, step)
    batch = AttentionBatch.build(slices, page_size=PAGE_SIZE)
    return model.step(ids, batch, cache, list(range(len(ids))))[1]


@every_level
@every_config
@pytest.mark.parametrize("split", [False, True], ids=["joined", "split"])
@torch.inference_mode()
def test_batch_invariance(tmp_path: Path, level: str, family: str, split: bool) -> None:
    """A sequence alone, on any number of threads, has the bits that it has in mixed batches."""
    if split and family == "gqa":
        pytest.skip("GQA has no up-projection")
    path = gguf_of(tmp_path, family, Kind.Q5_0, split=split)
    model = NativeModel(load_model(path, dtype="bf16", keeps_blocks=True).model)
    for break_even in BREAK_EVENS:
        together = native_logits(model, break_even)
        with thread_count(3):
            assert_same_bits(native_logits(model, break_even), together)
        first = 0
        caches = [
            PagedCache(model.config, num_pages=48, page_size=PAGE_SIZE, dtype=torch.bfloat16)
            for _ in TABLES
        ]
        for step in STEPS:
            for s, start, length in step:
                form = form_for(length, break_even)
                item = SequenceSlice(pages=TABLES[s], start=start, length=length, path=form)
                batch = AttentionBatch.build([item], page_size=PAGE_SIZE)
                ids = ids_of(model.config, [(s, start, length)])
                own = model.step(ids, batch, caches[s], list(range(length)))[1]
                assert_same_bits(own, together[first : first + length])
                first += length


@pytest.mark.parametrize("dtype", [None, "auto", "bf16"])
def test_info_counts_the_bytes_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str | None
) -> None:
    path = gguf_of(tmp_path, "mla", Kind.Q8_0)
    info(str(path), json_output=True, dtype=dtype)
    machine = json.loads(capsys.readouterr().out)["machine"]
    kept = load_model(path, dtype="auto", keeps_blocks=True).model
    assert machine["read_in_place"]
    assert 0.9 * weight_bytes(kept) < machine["weights_bytes"] < path.stat().st_size
