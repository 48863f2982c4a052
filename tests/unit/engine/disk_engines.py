"""Engines over tiny models with a prefix cache on disk, for tests."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lowlat.engine.disk_cache import DiskCacheOptions
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import RequestOptions
from lowlat.engine.runner import ModelRunner
from lowlat.engine.stats import DiskCacheStats
from lowlat.model.transformer import Transformer
from tests.fakes import mla_config, tiny_model

PAGE = 5
PROMPT = [(7 * place) % 251 for place in range(43)]
"""Eight full pages, and more."""
NUM_PAGES = 8
MODEL = tiny_model(mla_config())
LIMIT = 1 << 24


def disk_engine(
    folder: Path,
    model: Transformer = MODEL,
    *,
    max_bytes: int = LIMIT,
    cache_dtype: torch.dtype | None = None,
    page_size: int = PAGE,
    **options: Any,
) -> Engine:
    runner = ModelRunner(model, page_size=page_size, cache_dtype=cache_dtype)
    disk = DiskCacheOptions(folder=folder, max_bytes=max_bytes)
    options = {"context": 97, "eos_ids": frozenset[int]()} | options
    return Engine(runner, disk=disk, **options)


def run(engine: Engine) -> None:
    """Step until nothing is left, accounting for all pages."""
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert engine.runner.allocator.num_used == 0


def outputs(
    engine: Engine, prompt: Sequence[int] = PROMPT, *, namespace: bytes = b"", max_tokens: int = 7
) -> list[int]:
    """Generated tokens; every page of the request is on disk afterwards."""
    options = RequestOptions(cache_namespace=namespace)
    params = TokenSamplingParams(max_tokens=max_tokens, temperature=1.0, seed=3)
    request = engine.add(prompt, params, options)
    run(engine)
    flush(engine)
    return request.sequences[0].tokens[len(prompt) :]


def flush(engine: Engine) -> None:
    assert engine.disk is not None
    assert engine.disk.flush(60.0)


def stats(engine: Engine) -> DiskCacheStats:
    assert engine.disk is not None
    return engine.disk.recorder.snapshot()


def page_files(folder: Path) -> list[Path]:
    """The page files, the pages of a sequence in order."""
    files = [path for path in folder.glob("*/*/*") if len(path.name) == 64]
    return sorted(files, key=lambda path: -path.stat().st_mtime_ns)


def cold(prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    """The tokens of an engine without any cache."""
    engine = Engine(
        ModelRunner(options.pop("model", MODEL), page_size=PAGE),
        context=97,
        eos_ids=frozenset[int](),
        has_prefix_cache=False,
    )
    params = TokenSamplingParams(max_tokens=7, temperature=1.0, seed=3)
    request = engine.add(prompt, params)
    run(engine)
    return request.sequences[0].tokens[len(prompt) :]


def folders(root: Path) -> Iterator[Path]:
    return (path for path in [root, *root.rglob("*")] if path.is_dir())


def changed_weight() -> Any:
    model = tiny_model(mla_config())
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3, 2] += 1e-3  # pyright: ignore
    return model
