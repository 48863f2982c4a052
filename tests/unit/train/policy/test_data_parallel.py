"""Shares of data-parallel processes, here threads: together they are the batch of one process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import create_autospec

import pytest
import torch

from lowlat.ops import native
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.policy.batch_state import gathered
from lowlat.train.policy.distribution import SamplingDistribution
from lowlat.train.policy.forward import PolicySequence
from lowlat.train.policy.generation import GenerationFigures, Generator
from lowlat.train.policy.learner import PolicyBatch
from lowlat.train.policy.prompts import PromptRecord
from lowlat.train.policy.rollouts import Rollout, RolloutEngine
from lowlat.train.recipe.grpo import GRPOConfig
from lowlat.train.rewards.sample import Sample
from lowlat.train.rewards.workers import RewardWorkers
from tests.fakes import byte_tokenizer
from tests.unit.train.policy.models import CONFIGS, learner, masters

T = TypeVar("T")
DEADLINE = 120
SEQUENCES = [
    PolicySequence(prompt=[1 + k, 2, 3 * k], completion=[9 + k] * (1 + 3 * k)) for k in range(4)
]


def in_processes(size: int, work: Callable[[ProcessMesh], T]) -> list[T]:
    """The results of `work` in `size` processes."""
    barrier, slots = threading.Barrier(size), [None] * size

    def mesh(rank: int) -> Any:
        def gather(value: Any, axis: str) -> list[Any]:
            assert axis == "data"
            slots[rank] = value
            barrier.wait(DEADLINE)
            found = list(slots)
            barrier.wait(DEADLINE)
            return found

        made = create_autospec(ProcessMesh, instance=True)
        made.data_parallel_rank, made.data_parallel_size = rank, size
        made.is_main_process = rank == 0
        made.gather = gather
        made.share = partial(ProcessMesh.share, made)
        return made

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, map(mesh, range(size))))


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
def test_gradients_and_figures_are_those_of_one_process() -> None:
    """And so is what the first update leaves to the next ones."""
    config = CONFIGS["gqa-moe"]

    def learned(mesh: ProcessMesh) -> Any:
        model = masters(config)
        batch = PolicyBatch(
            sequences=SEQUENCES,
            advantages=[0.7, -1.2, 0.4, 1.5],
            is_counted=[True, True, False, True],
        )
        policy = learner(model, SamplingDistribution(min_p=1e-12), mesh=mesh)
        figures = policy.accumulate(batch, 2)
        left = gathered(batch, mesh)
        return dict(model.named_parameters()), figures, left

    ((alone, expected, left),) = in_processes(1, learned)
    (one, *rest), (other, *others) = in_processes(2, learned)
    for name, parameter in alone.items():
        if parameter.grad is not None:
            assert torch.equal(one[name].grad + other[name].grad, parameter.grad), name
    for figures, own in (rest, others):
        assert figures.experts.keys() == expected.experts.keys()
        for layer, counts in figures.experts.items():
            assert torch.equal(counts, expected.experts[layer])
        figures.experts = expected.experts
        assert figures == expected
        for made in ("old_logps", "masks"):
            assert_equal(getattr(own, made), getattr(left, made))


def assert_equal(found: dict[int, Any], expected: dict[int, Any]) -> None:
    assert list(found) == list(expected) == [0, 1, 2, 3]
    for number, own in expected.items():
        assert len(found[number]) == len(own)
        assert all(torch.equal(a, b) for a, b in zip(found[number], own, strict=True))


def generated(folder: Path, mesh: ProcessMesh) -> tuple[PolicyBatch, GenerationFigures, int]:
    """A batch of three groups, of which every second draw has a signal."""
    prompts = [PromptRecord(prompt=f"p{n}", record={}, ids=(n,)) for n in range(5)]
    engine = create_autospec(RolloutEngine, instance=True)
    rewards = create_autospec(RewardWorkers, instance=True)

    def generate(
        prompts: list[PromptRecord],
        first: int,
        finished: Callable[[int, list[Rollout]], None],
        **_options: Any,
    ) -> list[list[Rollout]]:
        groups = [
            [
                Rollout(
                    prompt=prompt,
                    completion=(65 + first + place, 65 + member),
                    logprobs=(-1.0, -2.0),
                    is_truncated=True,
                )
                for member in range(2)
            ]
            for place, prompt in enumerate(prompts)
        ]
        for place, group in reversed(list(enumerate(groups))):
            finished(place, group)
        return groups

    def score(samples: list[Sample]) -> list[list[float]]:
        return [[float(ord(s.completion[0]) * (ord(s.completion[1]) % 2) % 2)] for s in samples]

    engine.generate.side_effect = generate
    rewards.score.side_effect = score
    table = GRPOConfig(
        prompts="p.jsonl", reward_funcs=("r.py",), num_generations=2, dynamic_sampling=True
    )
    generator = Generator(
        engine,
        table,
        prompts=prompts,
        tokenizer=byte_tokenizer(),
        rewards=rewards,
        seed=3,
        samples=folder,
        mesh=mesh,
    )
    return *generator.batch(6, 1), generator.draws


def test_batches_are_those_of_one_process(tmp_path: Path) -> None:
    """Three prompts in two processes, and more in place of those without a signal."""
    (expected,) = in_processes(1, lambda mesh: generated(tmp_path / "one", mesh))
    assert expected[2] > 3
    assert in_processes(2, lambda mesh: generated(tmp_path / "two", mesh)) == [expected] * 2
    one, two = ((tmp_path / name / "step-00000001.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
