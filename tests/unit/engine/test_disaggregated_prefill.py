"""Disaggregated prefill: the tokens of one engine, pages that are damaged, shared, aborted or on
disk already. Processes are those of `tests/serve_parallel`.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlat.config.model import IndexerConfig
from lowlat.engine.disk_cache import DiskCacheOptions
from lowlat.engine.engine import Engine
from lowlat.engine.page_folder import PageFormat
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.prefill_request import PrefillRequest, TransferKind
from lowlat.engine.request import Request, RequestOptions
from lowlat.engine.scheduler import Limits
from tests.configs import MLA
from tests.fakes import gqa_config, mla_config, tiny_model

from .apart_engines import Apart, apart
from .disk_engines import LIMIT, MODEL, NUM_PAGES, PAGE, PROMPT, cold, disk_engine, page_files
from .disk_engines import outputs as outputs_on_disk

PARAMS = TokenSamplingParams(max_tokens=7, temperature=1.0, seed=3)
EXPECTED = cold()
INDEXER = IndexerConfig(index_n_heads=2, index_head_dim=9, index_topk=11)
SPARSE = tiny_model(mla_config(attention=replace(MLA, indexer=INDEXER)))
ALL_TOKENS = NUM_PAGES * PAGE
HEADER = PageFormat(fingerprint=bytes(32), page_size=PAGE, payload_bytes=0).file_bytes


def run(engine: Engine) -> None:
    deadline = time.monotonic() + 60.0
    while engine.has_work:
        engine.step()
        assert time.monotonic() < deadline
    engine.check_integrity()


def outputs(engine: Engine, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    request = engine.add(prompt, replace(PARAMS, **options))
    run(engine)
    return generated(request)


def generated(request: Request) -> list[int]:
    return request.sequences[0].tokens[len(request.prompt) :]


def step_until(pair: Apart, tokens: int) -> None:
    """Step until this many tokens have arrived."""
    deadline = time.monotonic() + 60.0
    while pair.stats.tokens < tokens:
        pair.decode.step()
        assert time.monotonic() < deadline


def damage_once(place: int) -> Any:
    """Changes byte `place` of the fourth page that is sent."""
    seen = []

    def change(tensor: Tensor) -> None:
        if tensor.dtype == torch.uint8:
            seen.append(tensor)
            if len(seen) == 4:
                tensor[place] ^= 1

    return change


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize(
    "model", [MODEL, tiny_model(gqa_config()), SPARSE], ids=["mla", "gqa", "dsa"]
)
def test_tokens_are_those_of_one_engine(
    tmp_path: Path, model: Any, dtype: torch.dtype | None
) -> None:
    expected = outputs_on_disk(disk_engine(tmp_path, model, cache_dtype=dtype))
    with apart(model, cache_dtype=dtype) as pair:
        assert outputs(pair.decode) == expected
        assert pair.stats.tokens == ALL_TOKENS and pair.stats.bytes > 0
        # A prefix in memory is neither computed nor sent again.
        assert outputs(pair.decode) == expected
        assert pair.stats.tokens == ALL_TOKENS and pair.stats.damaged == 0
        assert pair.prefill.recorder.snapshot().prompt_tokens == len(PROMPT)


def test_pages_hold_the_bits_of_the_prefill_engine() -> None:
    """Entries of MTP modules included."""
    with apart() as pair:
        outputs(pair.decode)
        caches = (pair.decode.runner.cache.tensors, pair.prefill.runner.cache.tensors)
        for one, other in zip(*caches, strict=True):
            assert one[:NUM_PAGES].count_nonzero() > 0
            assert torch.equal(one[:NUM_PAGES], other[:NUM_PAGES])


@pytest.mark.parametrize("place", [0, 90, HEADER + 7], ids=["magic", "key", "entry"])
def test_a_damaged_page_is_computed_again(place: int) -> None:
    with apart(change=damage_once(place)) as pair:
        assert outputs(pair.decode) == EXPECTED
        assert pair.stats.damaged == 1
        assert outputs(pair.decode) == EXPECTED


def test_a_prefix_on_disk_is_not_sent(tmp_path: Path) -> None:
    outputs_on_disk(disk_engine(tmp_path))
    for path in page_files(tmp_path)[3:]:
        path.unlink()
    disk = DiskCacheOptions(folder=tmp_path, max_bytes=LIMIT)
    with apart(disk=disk) as pair:
        request = pair.decode.add(PROMPT, PARAMS)
        run(pair.decode)
        assert generated(request) == EXPECTED
        assert pair.stats.tokens == ALL_TOKENS - 3 * PAGE
        assert request.num_matched == 3 * PAGE
        pair.decode.close()


def test_pages_for_two_requests_are_sent_once() -> None:
    with apart() as pair:
        requests = [pair.decode.add(PROMPT + more, PARAMS) for more in ([], [1], [1, 2])]
        run(pair.decode)
        assert pair.stats.tokens == ALL_TOKENS
        assert [generated(request) for request in requests] == [
            EXPECTED,
            cold([*PROMPT, 1]),
            cold([*PROMPT, 1, 2]),
        ]


def test_requests_of_other_namespaces_share_nothing() -> None:
    with apart() as pair:
        for namespace in (b"one", b"other"):
            request = pair.decode.add(PROMPT, PARAMS, RequestOptions(cache_namespace=namespace))
            run(pair.decode)
            assert generated(request) == EXPECTED and request.num_matched == 0
        assert pair.stats.tokens == 2 * ALL_TOKENS


@pytest.mark.parametrize("is_first", [True, False], ids=["computing", "awaiting"])
def test_an_aborted_request_ends(is_first: bool) -> None:
    """The other request gets the pages that the aborted one lacks."""
    permits = threading.Semaphore(0)
    with apart(permits=permits) as pair:
        requests = [pair.decode.add(PROMPT, PARAMS) for _ in range(2)]
        for _ in range(4):
            pair.decode.step()
        pair.decode.abort(requests[not is_first].id)
        permits.release(1000)
        run(pair.decode)
        assert generated(requests[is_first]) == EXPECTED
        pair.decode.abort(pair.decode.add(PROMPT[::-1], PARAMS).id)
        run(pair.decode)


def test_a_long_prompt_arrives_while_it_is_computed() -> None:
    """Each step of the prefill engine computes a page, which arrives before the next step."""
    limits, permits = Limits(step_tokens=PAGE, lone_tokens=PAGE), threading.Semaphore(0)
    with apart(permits=permits, prefill_options={"limits": limits}) as pair:
        request = pair.decode.add(PROMPT, PARAMS)
        for place in range(1, NUM_PAGES):
            permits.release()
            step_until(pair, place * PAGE)
            assert pair.stats.tokens == place * PAGE
        permits.release(1000)
        run(pair.decode)
        assert generated(request) == EXPECTED


def test_a_prompt_that_the_prefill_engine_refuses_is_computed_here() -> None:
    with apart(prefill_options={"context": 20}) as pair:
        assert outputs(pair.decode) == EXPECTED
        assert pair.stats.tokens == 0


def test_a_prompt_whose_prefill_fails_is_computed_here() -> None:
    with apart() as pair:

        def fail(*_: object) -> Any:
            raise RuntimeError("out of order")

        pair.prefill.runner.step = fail  # pyright: ignore[reportAttributeAccessIssue]
        assert outputs(pair.decode) == EXPECTED
        assert pair.stats.tokens == 0


@pytest.mark.parametrize("num_pages", [12, 20])
def test_preempted_requests_get_their_tokens(num_pages: int) -> None:
    limits = Limits(max_pages=num_pages)
    prompts = [PROMPT[start : start + 5 * PAGE + 2] for start in range(5)]
    with apart(limits=limits, prefill_options={"limits": limits}) as pair:
        many = replace(PARAMS, max_tokens=20)
        requests = [pair.decode.add(prompt, many) for prompt in prompts]
        run(pair.decode)
        found = [generated(request)[:7] for request in requests]
    assert found == [cold(prompt) for prompt in prompts]


def test_completions_of_one_prompt() -> None:
    with apart() as pair:
        request = pair.decode.add(PROMPT, replace(PARAMS, n=3))
        run(pair.decode)
        tokens = [sequence.tokens[len(PROMPT) :] for sequence in request.sequences]
        assert tokens[0] == EXPECTED and len(tokens) == 3
        assert pair.stats.tokens == ALL_TOKENS


def test_short_and_pooled_prompts_are_computed_here() -> None:
    with apart() as pair:
        assert outputs(pair.decode, PROMPT[: PAGE - 1]) == cold(PROMPT[: PAGE - 1])
        pair.decode.add(PROMPT, PARAMS, RequestOptions(pooling="mean"))
        run(pair.decode)
        assert pair.stats.tokens == 0
        assert pair.prefill.recorder.snapshot().steps == 0


def test_requests_pass_as_integers() -> None:
    request = PrefillRequest(
        kind=TransferKind.PREFILL,
        number=7,
        first=2,
        count=9,
        lora_int_id=1,
        priority=-3,
        cache_namespace=b"\x00key\xff",
        prompt=(5, 0, 99),
    )
    assert PrefillRequest.decode(request.encode()) == request
    end = PrefillRequest(kind=TransferKind.END)
    assert PrefillRequest.decode(end.encode()) == end
