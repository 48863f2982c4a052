"""Pooling of hidden states into embeddings: by hand, chunk by chunk, and through the engine."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.pooling import PoolingState
from lowlat.engine.request import Chunk, PoolingMode, RequestOptions
from lowlat.engine.runner import ModelRunner
from tests.fakes import gqa_config, tiny_model

from .disk_engines import PROMPT, disk_engine, outputs

MODES: tuple[PoolingMode, ...] = ("cls", "mean", "lasttoken")
STATES = torch.randn(11, 7, generator=torch.Generator().manual_seed(3))


def pooled(mode: PoolingMode, *cuts: int) -> tuple[float, ...]:
    """The embedding of STATES in chunks that end at `cuts`."""
    state = PoolingState(mode)
    bounds = [0, *cuts, len(STATES)]
    for start, end in itertools.pairwise(bounds):
        state.add(start, STATES[start:end])
    return state.result()


def test_the_formulas() -> None:
    assert pooled("cls") == tuple(STATES[0].tolist())
    assert pooled("lasttoken") == tuple(STATES[-1].tolist())
    torch.testing.assert_close(
        torch.tensor(pooled("mean"), dtype=torch.float64), STATES.double().mean(0)
    )


@pytest.mark.parametrize("mode", MODES)
def test_chunks_change_no_bit(mode: PoolingMode) -> None:
    assert pooled(mode, 4) == pooled(mode, 1, 2, 9) == pooled(mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_begins_again_is_pooled_once(mode: PoolingMode) -> None:
    """As after a preemption."""
    state = PoolingState(mode)
    state.add(0, STATES[3:9])
    state.add(0, STATES[:6])
    state.add(6, STATES[6:])
    assert state.result() == pooled(mode)


def test_hidden_states_may_be_overwritten() -> None:
    for mode in MODES:
        state, buffer = PoolingState(mode), STATES.double().clone()
        state.add(0, buffer)
        buffer.zero_()
        assert state.result() == pooled(mode)


def embed(engine: Engine, prompts: list[list[int]], mode: PoolingMode) -> list[Tensor]:
    options = RequestOptions(pooling=mode)
    ids = [engine.add(prompt, TokenSamplingParams(max_tokens=1), options).id for prompt in prompts]
    found: dict[int, Tensor] = {}
    while engine.has_work:
        for event in engine.step():
            assert event.token is None and event.finish_reason == "stop"
            assert event.embedding is not None
            found[event.request_id] = torch.tensor(event.embedding, dtype=torch.float64)
    engine.check_integrity()
    return [found[number] for number in ids]


@pytest.mark.parametrize("mode", MODES)
def test_the_engine_pools_every_token(mode: PoolingMode) -> None:
    """Also of a prompt whose prefix another request has left in the cache, and in chunks."""
    runner = ModelRunner(tiny_model(gqa_config()), page_size=4)
    engine = Engine(runner, context=97, eos_ids=frozenset(), prefill_chunk=8)
    prompts = [list(range(5, 42)), [9, 2, 7], list(range(5, 42))]
    engine.add(prompts[0], TokenSamplingParams(max_tokens=1))
    while engine.has_work:
        engine.step()
    for prompt, embedding in zip(prompts, embed(engine, prompts, mode), strict=True):
        pages: list[int] = []
        runner.reserve(pages, len(prompt))
        chunk = Chunk(tokens=prompt, start=0, pages=tuple(pages), num_logits=0, path="absorbed")
        _, hidden = runner.step([chunk])
        expected = {"cls": hidden[0], "mean": hidden.mean(0), "lasttoken": hidden[-1]}[mode]
        torch.testing.assert_close(embedding, expected.double())
        runner.release(pages)


def test_no_token_comes_from_the_cache_on_disk(tmp_path: Path) -> None:
    outputs(disk_engine(tmp_path))
    (warm,) = embed(disk_engine(tmp_path), [PROMPT], "mean")
    (cold,) = embed(disk_engine(tmp_path / "empty"), [PROMPT], "mean")
    torch.testing.assert_close(warm, cold)
