"""A batch of completions with their rewards: sampling, scoring, dynamic sampling, advantages, and
the file of samples.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor

from lowlat.text.tokenizer import Tokenizer
from lowlat.train.checkpoints.errors import using
from lowlat.train.policy.advantages import group_advantages, has_signal, soft_overlong_punishment
from lowlat.train.policy.distribution import SamplingDistribution
from lowlat.train.policy.forward import PolicySequence
from lowlat.train.policy.learner import PolicyBatch
from lowlat.train.policy.prompts import PromptRecord
from lowlat.train.policy.rollouts import Rollout, RolloutEngine, drawn
from lowlat.train.recipe.grpo import GRPOConfig
from lowlat.train.rewards.sample import RewardFailure, Sample, Score
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
    def of(
        groups: Sequence[Sequence[Rollout]], rewards: Float64[Tensor, "groups completions"]
    ) -> "GenerationFigures":
        """Of all sampled groups."""
        rollouts = [rollout for group in groups for rollout in group]
        known = rewards[~rewards.isnan()]
        return GenerationFigures(
            reward=known.mean().item() if len(known) else math.nan,
            reward_std=known.std().item() if len(known) > 1 else 0.0,
            length=sum(len(own.completion) for own in rollouts) / len(rollouts),
            truncated=sum(own.is_truncated for own in rollouts) / len(rollouts),
            no_signal=1 - has_signal(rewards).double().mean().item(),
            failed=int(rewards.isnan().sum()),
        )


class Generator:
    """Makes the batches of a GRPO phase. Batches follow from weights, seed and number of draws."""

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
    ) -> None:
        """samples: folder of the files of samples."""
        self._engine = engine
        self._table = table
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._rewards = rewards
        self._seed = seed
        self._samples = samples
        self._distribution = distribution_of(table)
        self._scores: dict[int, list[Score]] = {}
        self.draws = 0
        """Prompts drawn so far."""
        self.tokens_per_second = 0.0
        """Sampled tokens per second of the latest batch."""
        self.failure: RewardFailure | None = None
        """A failed reward of the latest batch."""

    def batch(self, num_completions: int, step: int) -> tuple[PolicyBatch, GenerationFigures]:
        """A batch of whole groups for the optimizer step number `step`, from 1."""
        wanted = num_completions // self._table.num_generations
        self._scores.clear()
        groups, rewards = self._sampled(wanted)
        figures = GenerationFigures.of(groups, rewards)
        scores = (score for own in self._scores.values() for score in own)
        self.failure = next((own for own in scores if isinstance(own, RewardFailure)), None)
        # Groups with a signal first, in the order sampled.
        order = (~has_signal(rewards)).int().argsort(stable=True)[:wanted]
        if not self._table.dynamic_sampling:
            order = torch.arange(wanted)
        rewards, groups = rewards[order], [groups[place] for place in order.tolist()]
        advantages = group_advantages(rewards, self._table.scale_rewards)
        self._write(step, groups, rewards, advantages)
        rollouts = [rollout for group in groups for rollout in group]
        masks = self._table.mask_truncated_completions
        is_known = (~rewards.isnan()).flatten().tolist()
        batch = PolicyBatch(
            sequences=[
                PolicySequence(prompt=own.prompt.ids, completion=own.completion) for own in rollouts
            ],
            advantages=advantages.flatten().tolist(),
            is_counted=[
                known and not (masks and own.is_truncated)
                for known, own in zip(is_known, rollouts, strict=True)
            ],
            logprobs=[own.logprobs for own in rollouts],
        )
        return batch, figures

    def _sampled(
        self, wanted: int
    ) -> tuple[list[list[Rollout]], Float64[Tensor, "groups completions"]]:
        """At least `wanted` groups and their rewards; with dynamic sampling more, until enough have
        a signal.
        """
        groups: list[list[Rollout]] = []
        rewards = torch.empty(0, self._table.num_generations, dtype=torch.float64)
        seconds, rounds = 0.0, 0
        while True:
            prompts = [
                drawn(self._prompts, self.draws + place, self._seed) for place in range(wanted)
            ]
            began = time.monotonic()
            new = self._engine.generate(
                prompts,
                self.draws,
                num_generations=self._table.num_generations,
                max_tokens=self._table.max_completion_length,
                distribution=self._distribution,
            )
            seconds += time.monotonic() - began
            self.draws += wanted
            rounds += 1
            groups += new
            rewards = torch.cat([rewards, self._scored(new)])
            is_enough = int(has_signal(rewards).sum()) >= wanted
            is_last = rounds == self._table.max_num_gen_batches
            if is_enough or is_last or not self._table.dynamic_sampling:
                break
        count = sum(len(own.completion) for group in groups for own in group)
        self.tokens_per_second = count / seconds
        return groups, rewards

    def _scored(self, groups: Sequence[Sequence[Rollout]]) -> Float64[Tensor, "groups completions"]:
        """Weighted sums of rewards, NaN if one failed, with the punishment of long completions."""
        rollouts = [rollout for group in groups for rollout in group]
        samples = [
            Sample(
                own.prompt.prompt,
                self._text(own),
                own.prompt.record,
                num_tokens=len(own.completion),
            )
            for own in rollouts
        ]
        scores = self._rewards.score(samples)
        self._scores.update(zip(map(id, rollouts), scores, strict=True))
        weights = self._table.reward_weights or (1.0,) * len(self._table.reward_funcs)
        rewards = torch.tensor([_total(own, weights) for own in scores], dtype=torch.float64)
        cache = self._table.soft_punish_cache
        if cache is not None:
            longest = self._table.max_completion_length
            rewards += torch.tensor(
                [soft_overlong_punishment(len(own.completion), longest, cache) for own in rollouts],
                dtype=torch.float64,
            )
        return rewards.view(len(groups), -1)

    def _text(self, rollout: Rollout) -> str:
        """The completion without its end token; tags of reasoning may be special tokens."""
        ids = rollout.completion
        ids = ids if rollout.is_truncated else ids[:-1]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _write(
        self,
        step: int,
        groups: Sequence[Sequence[Rollout]],
        rewards: Float64[Tensor, "groups completions"],
        advantages: Float64[Tensor, "groups completions"],
    ) -> None:
        """The samples of a step as a file of their own, which a resumed run writes again."""
        lines = []
        rollouts = [rollout for group in groups for rollout in group]
        numbers = zip(rewards.flatten().tolist(), advantages.flatten().tolist(), strict=True)
        for rollout, (reward, advantage) in zip(rollouts, numbers, strict=True):
            scores = zip(self._table.reward_funcs, self._scores[id(rollout)], strict=True)
            sample = {
                "step": step,
                "prompt": rollout.prompt.prompt,
                "completion": self._text(rollout),
                "tokens": len(rollout.completion),
                "is_truncated": rollout.is_truncated,
                "rewards": {n: s if isinstance(s, float) else str(s) for n, s in scores},
                "reward": None if math.isnan(reward) else reward,
                "advantage": advantage,
            }
            lines.append(json.dumps(sample, ensure_ascii=False) + "\n")
        path = self._samples / f"step-{step:08}.jsonl"
        with using(path):
            make_folder(self._samples)
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
