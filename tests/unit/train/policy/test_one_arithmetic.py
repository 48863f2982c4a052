"""Rollout and trainer are one arithmetic: over the whole vocabulary, at every sampled token, the
trainer's logits are those that the engine sampled from, bit for bit, and the experts are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lowlat.attention.cache import PAGE_SIZE
from lowlat.engine import engine as engine_module
from lowlat.engine.engine import Engine
from lowlat.engine.model_step import run_step
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import Request
from lowlat.engine.runner import ModelRunner
from lowlat.engine.sampler import SampledToken, SequenceSampler, StepLogits
from lowlat.engine.scheduler import Limits
from lowlat.model.native import KeptActivations, NativeModel
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from lowlat.ops.sampling import kept_weights
from lowlat.train.policy.distribution import SamplingDistribution
from lowlat.train.policy.forward import PolicyForward, PolicySequence
from tests.lowlat_configs import EVERY
from tests.parameters import slow_except
from tests.unit.train.policy.models import CONFIGS, learner, masters

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

CHUNK = PAGE_SIZE
"""Prompts that begin with SHARED are two chunks, the last on the absorbed or the decode path."""
SHARED = [(i * 37) % 256 for i in range(PAGE_SIZE)]
PROMPTS = [
    [*SHARED, *[(i * 29) % 256 for i in range(38)]],
    [*SHARED, *[(i * 29) % 256 for i in range(9)]],
    [5, 6, 7] * 4,
    [(i * i) % 251 for i in range(50)],
    [*SHARED, *[(i * 29) % 256 for i in range(38)]],
]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "truncated": {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
    "hot": {"temperature": 1.3, "top_p": 0.9},
}
LENGTH = 45


class Rollouts(NamedTuple):
    """What an engine sampled, and what it sampled from."""

    requests: list[Request]
    logits: dict[tuple[int, int], list[Tensor]]
    """By request id and index: the row of every token."""
    experts: dict[tuple[int, tuple[int, ...]], Tensor]
    """By length of the prompt and all tokens so far: those of the last token, [layers, chosen]."""
    drafted: bool
    """Whether a decode step verified draft tokens."""


@contextmanager
def observed(found: dict[str, Any]) -> Iterator[None]:
    """Records the rows that the engine samples from and the experts of all steps."""
    step, sample = NativeModel.step, StepLogits.sample

    def kept_step(model: NativeModel, *args: Any, depth: int | None = None, **options: Any) -> Any:
        if depth is not None:
            return step(model, *args, depth=depth, **options)
        kept = found["kept"] = KeptActivations.empty(model.config, len(args[0]))
        return step(model, *args, kept=kept, **options)

    def kept_run(runner: ModelRunner, chunks: list[Any]) -> Any:
        result = run_step(runner, chunks)
        experts = found["kept"].experts
        first = 0
        for chunk in chunks:
            own = chunk.sequence
            known = [*own.tokens, *own.draft_tokens]
            found["drafted"] |= chunk.start + chunk.length > len(own.tokens)
            for place in range(0 if experts is None else chunk.length):
                assert experts is not None
                key = len(own.request.prompt), tuple(known[: chunk.start + place + 1])
                chosen = experts[:, first + place]
                assert torch.equal(found["experts"].setdefault(key, chosen), chosen)
            first += chunk.length
        return result

    def kept_sample(rows: StepLogits, row: int, sampler: SequenceSampler) -> SampledToken | None:
        samplers = found["engine"]._requests._samplers.items()
        own = next(sequence for sequence, each in samplers if each is sampler)
        key = own.request.id, own.index
        found["logits"].setdefault(key, []).append(rows._logits[row].clone())
        return sample(rows, row, sampler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeModel, "step", kept_step)
        patch.setattr(engine_module, "run_step", kept_run)
        patch.setattr(StepLogits, "sample", kept_sample)
        yield


def sampled(model: Transformer, sampling: dict[str, Any], n: int = 2) -> Rollouts:
    """Groups of `n` for PROMPTS, with chunked prefill, prefix cache, preemption and drafts; the
    last prompt comes when the first is cached.
    """
    engine = Engine(
        ModelRunner(model, page_size=16),
        context=PAGE_SIZE + 96,
        eos_ids=frozenset({3}),
        limits=Limits(step_tokens=23, lone_tokens=23, mixed_tokens=7, max_pages=16),
        prefill_chunk=CHUNK,
    )
    assert engine.speculator is not None
    engine.speculator.policy.choose = lambda most: {s: min(2, n) for s, n in most.items()}
    found: dict[str, Any] = {"logits": {}, "experts": {}, "engine": engine, "drafted": False}
    requests = []
    with observed(found):
        for number, prompt in enumerate(PROMPTS):
            params = TokenSamplingParams(max_tokens=LENGTH, seed=number, n=n, **sampling)
            requests.append(engine.add(prompt, params))
            for _ in range(7):
                engine.step()
        while engine.has_work:
            engine.step()
    engine.check_integrity()
    return Rollouts(requests, found["logits"], found["experts"], found["drafted"])


def sequences_of(requests: list[Request]) -> list[tuple[tuple[int, int], PolicySequence]]:
    return [
        (
            (request.id, own.index),
            PolicySequence(prompt=request.prompt, completion=own.tokens[len(request.prompt) :]),
        )
        for request in requests
        for own in request.sequences
    ]


def assert_one_arithmetic(
    model: Transformer, rollouts: Rollouts, sampling: dict[str, Any], chunk: int = CHUNK
) -> None:
    distribution = SamplingDistribution(**sampling)
    keyed = sequences_of(rollouts.requests)
    run = PolicyForward(model, prefill_chunk=chunk)
    # not the engine's batches: in another order, and by three
    for first in range(0, len(keyed), 3):
        part = keyed[first : first + 3][::-1]
        result = run.run([own for _, own in part])
        logits = run.logits(result, slice(None))
        expected = torch.cat([torch.stack(rollouts.logits[key]) for key, _ in part])
        assert torch.equal(logits, expected)
        masks = distribution.masks(logits)
        probabilities = distribution.log_probabilities(logits, masks).exp()
        for row, own in zip(logits, probabilities, strict=True):
            weights = kept_weights(row, **sampling)
            assert torch.equal(weights > 0, own > 0)
            torch.testing.assert_close(own, weights / weights.sum(), rtol=1e-12, atol=0)
        assert bool((probabilities.gather(1, result.targets[:, None]) > 0).all())
        if model.config.moe is not None:
            assert_same_experts(part, result, rollouts, moe_layers(model))


def moe_layers(model: Transformer) -> list[int]:
    return [n for n in range(model.config.num_hidden_layers) if model.config.is_moe_layer(n)]


def assert_same_experts(part: Any, result: Any, rollouts: Rollouts, layers: list[int]) -> None:
    first = 0
    for (_, own), length in zip(part, result.lengths, strict=True):
        ids = own.inputs
        for place in range(length):
            chosen = rollouts.experts.get((len(own.prompt), tuple(ids[: place + 1])))
            # entries from the prefix cache have other prompts' lengths, or were not computed
            assert chosen is not None or place < len(own.prompt) - 1
            if chosen is not None:
                ours = result.kept.experts[layers, first + place]
                assert torch.equal(ours, chosen[layers])
        first += length


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("name", slow_except(("mla-moe-mtp", "gqa"), CONFIGS))
def test_trainer_and_sampler_have_equal_logits_and_experts(
    name: str, sampling: dict[str, Any]
) -> None:
    model = learner(masters(CONFIGS[name])).model
    rollouts = sampled(model, sampling)
    assert any(own.was_preempted for request in rollouts.requests for own in request.sequences)
    assert any(request.num_matched > 0 for request in rollouts.requests)
    # without MTP modules, drafts are what followed the same tokens before, if any
    assert rollouts.drafted or model.config.num_nextn_predict_layers == 0
    assert_one_arithmetic(model, rollouts, sampling)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EVERY if "tpa" not in n and n != "gated"])
def test_trainer_and_sampler_have_equal_logits_and_experts_with_every_attention(name: str) -> None:
    """GLA, MLRA, GTA, sliding windows, layers that differ."""
    model = learner(masters(EVERY[name])).model
    sampling = SAMPLINGS["truncated"]
    assert_one_arithmetic(model, sampled(model, sampling), sampling)
