"""The prefix cache on disk: the same tokens cold and warm, concurrent requests, fingerprints.
Its files are those of `test_disk_cache_files`.
"""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.model import IndexerConfig, RopeConfig
from lowlat.engine import cache_fingerprint, prefix_loader
from lowlat.engine.cache_fingerprint import fingerprint_of
from lowlat.engine.engine import Engine
from lowlat.engine.page_folder import PageFolder
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import Chunk
from lowlat.engine.runner import ModelRunner
from lowlat.engine.scheduler import Limits
from lowlat.utils import sampled_digest
from tests.configs import MLA
from tests.fakes import gqa_config, mla_config, tiny_model

from .disk_engines import (
    MODEL,
    NUM_PAGES,
    PAGE,
    PROMPT,
    changed_weight,
    cold,
    disk_engine,
    flush,
    outputs,
    page_files,
    run,
    stats,
)

EXPECTED = cold()
INDEXER = IndexerConfig(index_n_heads=2, index_head_dim=9, index_topk=11)
SPARSE = tiny_model(mla_config(attention=replace(MLA, indexer=INDEXER)))


# The same tokens


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize(
    "model", [MODEL, tiny_model(gqa_config()), SPARSE], ids=["mla", "gqa", "dsa"]
)
def test_tokens_are_equal_cold_in_memory_and_from_disk(
    tmp_path: Path, model: Any, dtype: torch.dtype | None
) -> None:
    first = disk_engine(tmp_path, model, cache_dtype=dtype)
    expected = outputs(first)
    assert outputs(first) == expected
    assert stats(first).hit_tokens == 0
    second = disk_engine(tmp_path, model, cache_dtype=dtype)
    assert outputs(second) == expected
    assert stats(second).hit_tokens == NUM_PAGES * PAGE
    if dtype is None:
        assert expected == cold(model=model)


def step_lengths(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens of all steps, as they come."""
    lengths: list[int] = []
    step = engine.runner.step

    def counted(chunks: Sequence[Chunk]) -> Any:
        lengths.extend(len(chunk.tokens) for chunk in chunks)
        return step(chunks)

    monkeypatch.setattr(engine.runner, "step", counted)
    return lengths


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("model", [MODEL, SPARSE], ids=["mla", "dsa"])
def test_of_a_prompt_that_fills_its_last_page_only_the_last_token_is_computed(
    tmp_path: Path, model: Any, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = PROMPT[: NUM_PAGES * PAGE]
    expected = outputs(disk_engine(tmp_path, model, cache_dtype=dtype), prompt)
    engine = disk_engine(tmp_path, model, cache_dtype=dtype)
    lengths = step_lengths(engine, monkeypatch)
    assert outputs(engine, prompt, max_tokens=1) == expected[:1]
    assert lengths == [1]
    assert stats(engine).hit_tokens == NUM_PAGES * PAGE
    assert stats(engine).written_bytes == 0
    # Pages in memory, but for that of the last token, which is on disk.
    lengths.clear()
    assert outputs(engine, prompt) == expected
    assert lengths[0] == 1
    params = TokenSamplingParams(max_tokens=2, n=2, temperature=1.0, seed=3)
    request = engine.add(prompt, params)
    run(engine)
    assert request.num_matched == NUM_PAGES * PAGE - 1
    # Without the last page's file.
    flush(engine)
    page_files(tmp_path)[NUM_PAGES - 1].unlink()
    other = disk_engine(tmp_path, model, cache_dtype=dtype)
    assert outputs(other, prompt) == expected
    assert stats(other).hit_tokens == (NUM_PAGES - 1) * PAGE


def test_a_last_page_with_bad_values_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it is not in the index when the step shows them."""
    prompt = PROMPT[: NUM_PAGES * PAGE]
    outputs(disk_engine(tmp_path), prompt, max_tokens=1)
    assert len(page_files(tmp_path)) == NUM_PAGES
    engine = disk_engine(tmp_path)
    step = engine.runner.step
    monkeypatch.setattr(
        engine.runner, "step", lambda chunks: tuple(math.nan * rows for rows in step(chunks))
    )
    engine.add(prompt, TokenSamplingParams(max_tokens=1))
    run(engine)
    flush(engine)
    assert page_files(tmp_path) == []


def test_pages_read_from_disk_hold_the_bits_that_were_written(tmp_path: Path) -> None:
    first, second = disk_engine(tmp_path), disk_engine(tmp_path)
    outputs(first)
    outputs(second)
    for one, other in zip(first.runner.cache.tensors, second.runner.cache.tensors, strict=True):
        held = one[:NUM_PAGES]
        assert held.count_nonzero() > 0
        assert torch.equal(held, other[:NUM_PAGES])


@pytest.mark.parametrize("lost", range(NUM_PAGES))
def test_what_is_missing_is_computed(tmp_path: Path, lost: int) -> None:
    outputs(disk_engine(tmp_path))
    page_files(tmp_path)[lost].unlink()
    engine = disk_engine(tmp_path)
    assert outputs(engine) == EXPECTED
    assert stats(engine).hit_tokens == lost * PAGE
    assert len(page_files(tmp_path)) == 9


def test_a_request_reports_tokens_from_disk_as_cached(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path)
    request = engine.add(PROMPT, TokenSamplingParams(max_tokens=2))
    run(engine)
    assert request.num_matched == NUM_PAGES * PAGE


def test_requests_that_share_a_prompt_read_it_once(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path)
    requests = [
        engine.add(PROMPT, TokenSamplingParams(max_tokens=7, temperature=1.0, seed=3))
        for _ in range(3)
    ]
    run(engine)
    assert [request.sequences[0].tokens[len(PROMPT) :] for request in requests] == [EXPECTED] * 3
    assert stats(engine).hit_tokens == NUM_PAGES * PAGE


def test_others_decode_while_pages_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that is not in memory delays its own request only."""
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path)
    other = engine.add([3, 1, 4], TokenSamplingParams(max_tokens=40))
    engine.step()
    monkeypatch.setattr(prefix_loader, "STALL_SECONDS", 1e9)
    read = PageFolder.read

    def only_waiting(self: PageFolder, *args: Any, may_wait: bool) -> str:
        return read(self, *args, may_wait=True) if may_wait else "pending"

    monkeypatch.setattr(PageFolder, "read", only_waiting)
    request = engine.add(PROMPT, TokenSamplingParams(max_tokens=7, temperature=1.0, seed=3))
    while other.sequences[0].finish_reason is None:
        engine.step()
        engine.check_integrity()
    assert other.sequences[0].num_outputs == 40
    assert request.started_at is None
    run(engine)
    assert request.sequences[0].tokens[len(PROMPT) :] == EXPECTED
    assert stats(engine).hit_tokens == NUM_PAGES * PAGE


def test_a_request_that_ends_while_it_loads_releases_its_pages(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path)
    request = engine.add(PROMPT, TokenSamplingParams(max_tokens=7))
    assert engine.step() == []
    assert engine.scheduler.loading == request.sequences
    engine.abort(request.id)
    engine.check_integrity()
    assert not engine.has_work
    assert engine.runner.allocator.num_used == 0


def test_a_loading_request_gives_its_pages_to_running_ones(tmp_path: Path) -> None:
    """Pages run out while a request loads; it is preempted, and its tokens stay the same."""
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path, limits=Limits(max_pages=12))
    other = engine.add([3, 1, 4], TokenSamplingParams(max_tokens=45, ignore_eos=True))
    engine.step()
    requests = [
        engine.add(PROMPT, TokenSamplingParams(max_tokens=7, temperature=1.0, seed=3))
        for _ in range(2)
    ]
    run(engine)
    assert other.sequences[0].num_outputs == 45
    for request in requests:
        assert request.sequences[0].tokens[len(PROMPT) :] == EXPECTED


def test_two_engines_share_a_folder_at_once(tmp_path: Path) -> None:
    one, other = disk_engine(tmp_path), disk_engine(tmp_path)
    prompts = [[first, *PROMPT] for first in range(4)]
    expected = [cold(prompt) for prompt in prompts]
    for engine in (one, other, other, one):
        assert [outputs(engine, prompt) for prompt in prompts] == expected
    assert stats(other).written_bytes == 0
    assert stats(other).hit_tokens >= 4 * NUM_PAGES * PAGE
    assert len(page_files(tmp_path)) == 4 * 10


def test_generated_tokens_are_stored_too(tmp_path: Path) -> None:
    """A preempted request finds its own output on disk when memory has forgotten it."""
    outputs(disk_engine(tmp_path), max_tokens=12)
    assert len(page_files(tmp_path)) == (len(PROMPT) + 11) // PAGE


# What does not fit


def test_namespaces_share_nothing(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path), namespace=b"one key")
    engine = disk_engine(tmp_path)
    assert outputs(engine, namespace=b"another key") == EXPECTED
    assert stats(engine).hit_tokens == 0
    (model,) = (path for path in tmp_path.iterdir() if path.is_dir())
    names = [path.name for path in model.iterdir()]
    assert len(names) == 2
    assert not any(b"key".hex() in name for name in names)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (changed_weight(), {}),
        (MODEL, {"cache_dtype": torch.int8}),
        (MODEL, {"page_size": 7}),
        (MODEL, {"prefill_chunk": 35}),
        (tiny_model(mla_config(rms_norm_eps=1e-3)), {}),
        (tiny_model(mla_config(), torch.float32), {}),
    ],
    ids=["weight", "cache dtype", "page size", "chunk", "config", "dtype"],
)
def test_other_models_have_other_fingerprints(
    tmp_path: Path, model: Any, options: dict[str, Any]
) -> None:
    outputs(disk_engine(tmp_path))
    engine = disk_engine(tmp_path, model, **options)
    outputs(engine)
    assert stats(engine).hit_tokens == 0
    assert len({path.parent.parent for path in page_files(tmp_path)}) == 2


def test_the_fingerprint_has_the_kernels_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(MODEL, page_size=PAGE)
    same = fingerprint_of(runner, context=97)
    assert fingerprint_of(ModelRunner(MODEL, page_size=PAGE), context=97) == same
    for name in ("version", "code_digest", "_torch_facts"):
        with monkeypatch.context() as patch:
            patch.setattr(f"lowlat.engine.cache_fingerprint.{name}", lambda *args: "something else")
            assert fingerprint_of(runner, context=97) != same


def test_the_fingerprint_has_the_rotary_factors_of_the_served_context() -> None:
    factors, long = (1.0,) * 3, (2.0,) * 3
    rope = RopeConfig(
        rope_theta=100.0,
        rope_type="longrope",
        original_max_position_embeddings=50,
        pair_factors=factors,
        long_pair_factors=long,
    )
    for scaled, is_equal in ((rope, False), (replace(rope, long_pair_factors=None), True)):
        runner = ModelRunner(tiny_model(mla_config(rope=scaled)), page_size=PAGE)
        short, whole = (fingerprint_of(runner, context=context) for context in (50, 51))
        assert (short == whole) == is_equal


@pytest.mark.parametrize("is_larger", [True, False])
def test_a_rewritten_file_has_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_larger: bool
) -> None:
    """Regression: of a model larger than memory, a change between the samples of a tensor."""
    monkeypatch.setattr(cache_fingerprint, "is_larger_than_memory", lambda size: is_larger)
    for module in (cache_fingerprint, sampled_digest):
        monkeypatch.setattr(module, "SAMPLES", 2)
        monkeypatch.setattr(module, "SAMPLE_BYTES", 4)
    config = mla_config()
    save_model(tiny_model(config), config, tmp_path / "model", source=None)
    file = tmp_path / "model/model.safetensors"
    copied = tmp_path / "copy"
    shutil.copytree(file.parent, copied)

    def fingerprint(folder: Path) -> bytes:
        runner = ModelRunner(load_model(folder).model, page_size=PAGE)
        return fingerprint_of(runner, context=97)

    same = fingerprint(file.parent)
    assert fingerprint(copied) == same
    written = file.stat().st_mtime_ns
    data = bytearray(file.read_bytes())
    row = load_model(copied).model.embed_tokens.weight[5].detach()
    data[data.index(row.numpy().tobytes())] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(written + 1, written + 1))
    assert fingerprint(file.parent) != same
    os.utime(file, ns=(written, written))
    assert (fingerprint(file.parent) == same) == is_larger
