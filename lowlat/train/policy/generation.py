"""A batch of completions with their rewards: sampling, scoring, dynamic sampling, advantages, and
the file of samples.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from lowlat.text.tokenizer import Tokenizer
from lowlat.train.checkpoints.errors import using
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.policy.advantages import group_advantages, has_signal, soft_overlong_punishment
from lowlat.train.policy.distribution import SamplingDistribution
from lowlat.train.policy.learner import PolicyBatch
from lowlat.train.policy.prompts import PromptRecord
from lowlat.train.policy.rollouts import Rollout, RolloutEngine, drawn
from lowlat.train.policy.scoring import BackgroundScoring
from lowlat.train.recipe.grpo import GRPOConfig
from lowlat.train.rewards.sample import RewardFailure, Score
from lowlat.train.rewards.workers import RewardWorkers
from lowlat.utils.atomic_files import make_folder, replace_file


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationFigures:
    """What is logged of a batch of completions: fields of `RolloutRecord`."""

    reward: float
    reward_std: float
    length: float
    truncated: float
    no_signal: float
    failed: int

    @staticmethod
    def of(groups: Sequence[Sequence["ScoredRollout"]]) -> "GenerationFigures":
        """Of all sampled groups."""
        rollouts = [own.rollout for group in groups for own in group]
        rewards = rewards_of(groups)
        known = rewards[~rewards.isnan()]
        return GenerationFigures(
            reward=known.mean().item() if len(known) else math.nan,
            reward_std=known.std().item() if len(known) > 1 else 0.0,
            length=sum(own.num_sampled for own in rollouts) / len(rollouts),
            truncated=sum(own.is_truncated for own in rollouts) / len(rollouts),
            no_signal=1 - has_signal(rewards).double().mean().item(),
            failed=int(rewards.isnan().sum()),
        )


class ScoredRollout(NamedTuple):
    """A completion and what the reward functions make of it."""

    rollout: Rollout
    scores: list[Score]
    """Of each function."""
    reward: float
    """Weighted sum of the scores, with the punishment of long completions; NaN if one failed."""


def rewards_of(
    groups: Sequence[Sequence[ScoredRollout]],
) -> Float64[Tensor, "groups completions"]:
    """The rewards of completions in groups of one size."""
    rewards = [[own.reward for own in group] for group in groups]
    return torch.tensor(rewards, dtype=torch.float64)


class Generator:
    """Makes the batches of a GRPO phase, which weights, seed and number of draws determine."""

    def __init__(
        self,
        engine: RolloutEngine,
        table: GRPOConfig,
        *,
        prompts: Sequence[PromptRecord],
        tokenizer: Tokenizer,
        rewards: RewardWorkers,
        seed: int,
        samples: Path,
        mesh: ProcessMesh | None = None,
    ) -> None:
        """samples: folder of the files of samples, which rank 0 of `mesh` writes; every process of
        its axis `data` samples and scores a share of the prompts.
        """
        self._mesh = mesh or ProcessMesh()
        self._engine = engine
        self._table = table
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._rewards = rewards
        self._seed = seed
        self._samples = samples
        self._distribution = distribution_of(table)
        self.draws = 0
        """Prompts drawn so far."""
        self.tokens_per_second = 0.0
        """Sampled tokens per second of the latest batch."""
        self.failure: RewardFailure | None = None
        """A failed reward of the latest batch."""

    def batch(self, num_completions: int, step: int) -> tuple[PolicyBatch, GenerationFigures]:
        """A batch of whole groups for the optimizer step number `step`, from 1; collective. All
        processes get the whole batch, that of one process.
        """
        wanted = num_completions // self._table.num_generations
        groups = self._sampled(wanted)
        figures = GenerationFigures.of(groups)
        scores = (score for group in groups for own in group for score in own.scores)
        self.failure = next((own for own in scores if isinstance(own, RewardFailure)), None)
        # Groups with a signal first, in the order sampled.
        order = (~has_signal(rewards_of(groups))).int().argsort(stable=True)[:wanted]
        if not self._table.dynamic_sampling:
            order = torch.arange(wanted)
        groups = [groups[place] for place in order.tolist()]
        by_group = group_advantages(rewards_of(groups), self._table.scale_rewards)
        advantages = by_group.flatten().tolist()
        used = [own for group in groups for own in group]
        if self._mesh.is_main_process:
            self._write(step, used, advantages)
        return self._batch_of(used, advantages), figures

    def _batch_of(
        self, scored: Sequence[ScoredRollout], advantages: Sequence[float]
    ) -> PolicyBatch:
        """The turns of all completions, each with the advantage of its completion."""
        masks = self._table.mask_truncated_completions
        batch = PolicyBatch(sequences=[], advantages=[], is_counted=[])
        for number, (own, advantage) in enumerate(zip(scored, advantages, strict=True)):
            is_counted = not math.isnan(own.reward) and not (masks and own.rollout.is_truncated)
            for sequence, logprobs in own.rollout.turns():
                batch.sequences.append(sequence)
                batch.advantages.append(advantage)
                batch.is_counted.append(is_counted)
                batch.logprobs.append(logprobs)
                batch.completions.append(number)
        return batch

    def _sampled(self, wanted: int) -> list[list[ScoredRollout]]:
        """At least `wanted` groups; with dynamic sampling more, until enough have a signal."""
        groups: list[list[ScoredRollout]] = []
        seconds, rounds = 0.0, 0
        while True:
            own = self._mesh.share(wanted)
            shares = self._mesh.gather(self._scored(self.draws + own.start, len(own)), "data")
            groups += chain.from_iterable(share for share, _ in shares)
            seconds += max(own for _, own in shares)
            self.draws += wanted
            rounds += 1
            is_enough = int(has_signal(rewards_of(groups)).sum()) >= wanted
            is_last = rounds == self._table.max_num_gen_batches
            if is_enough or is_last or not self._table.dynamic_sampling:
                break
        count = sum(own.rollout.num_sampled for group in groups for own in group)
        self.tokens_per_second = count / seconds
        return groups

    def _scored(self, first_draw: int, count: int) -> tuple[list[list[ScoredRollout]], float]:
        """Sample and score `count` groups, draws from `first_draw`; the seconds are of sampling."""
        prompts = [drawn(self._prompts, first_draw + n, self._seed) for n in range(count)]
        with closing(BackgroundScoring(self._rewards.score)) as scoring:
            began = time.monotonic()
            groups = self._engine.generate(
                prompts,
                first_draw,
                num_generations=self._table.num_generations,
                max_tokens=self._table.max_completion_length,
                distribution=self._distribution,
                finished=lambda place, group: scoring.add(
                    place, [own.to_sample(self._tokenizer) for own in group]
                ),
            )
            seconds = time.monotonic() - began
            scores = scoring.scores()
        scored = [
            list(map(self._rewarded, group, scores[place])) for place, group in enumerate(groups)
        ]
        return scored, seconds

    def _rewarded(self, rollout: Rollout, scores: list[Score]) -> ScoredRollout:
        table = self._table
        if rollout.failure is not None:
            scores = [rollout.failure] * len(scores)
        reward = _total(scores, table.reward_weights or (1.0,) * len(scores))
        if table.soft_punish_cache is not None:
            reward += soft_overlong_punishment(
                len(rollout.completion), table.max_completion_length, table.soft_punish_cache
            )
        return ScoredRollout(rollout, scores, reward)

    def _write(
        self, step: int, scored: Sequence[ScoredRollout], advantages: Sequence[float]
    ) -> None:
        """The samples of a step as a file of their own, which a resumed run writes again."""
        samples = []
        for (rollout, scores, reward), advantage in zip(scored, advantages, strict=True):
            named = zip(self._table.reward_funcs, scores, strict=True)
            sample = {
                "step": step,
                "prompt": rollout.prompt.prompt,
                "completion": rollout.text(self._tokenizer),
                "tokens": rollout.num_sampled,
                "is_truncated": rollout.is_truncated,
                "rewards": {n: s if isinstance(s, float) else str(s) for n, s in named},
                "reward": None if math.isnan(reward) else reward,
                "advantage": advantage,
            }
            samples.append(sample)
        write_samples(self._samples / f"step-{step:08}.jsonl", samples)


def write_samples(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file of samples. Raises UserError."""
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    with using(path):
        make_folder(path.parent)
        replace_file(path, "".join(lines).encode())


def _total(scores: Sequence[Score], weights: Sequence[float]) -> float:
    """The weighted sum of `scores`; NaN if one failed."""
    pairs = zip(scores, weights, strict=True)
    return sum(score * weight if isinstance(score, float) else math.nan for score, weight in pairs)


def distribution_of(table: GRPOConfig) -> SamplingDistribution:
    """The sampling distribution of a phase."""
    return SamplingDistribution(
        temperature=table.temperature, top_k=table.top_k, top_p=table.top_p, min_p=table.min_p
    )
