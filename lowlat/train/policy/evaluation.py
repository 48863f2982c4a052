"""Evaluation on held-out prompts: unbiased pass@k of sampled completions (Chen et al. 2021)."""

import math
import statistics
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lowlat.text.tokenizer import Tokenizer
from lowlat.train.metrics.record import PassAtKRecord
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.policy.distribution import SamplingDistribution
from lowlat.train.policy.generation import write_samples
from lowlat.train.policy.prompts import PromptRecord
from lowlat.train.policy.rollouts import EVALUATION, Rollout, RolloutEngine
from lowlat.train.recipe.tables import EvaluationConfig
from lowlat.train.rewards.sample import RewardFailure, Score
from lowlat.train.rewards.workers import RewardWorkers


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k completions passes, estimated from n samples of which c pass: the
    unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), 1 - C(n - c, k) / C(n, k).
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


class EvaluatedPrompts(NamedTuple):
    """Result of an evaluation."""

    record: PassAtKRecord
    samples: list[dict[str, Any]]
    """Every completion with its score, as JSON values."""
    failure: RewardFailure | None
    """A failed reward."""


def evaluate_completions(
    groups: Sequence[Sequence[Rollout]],
    rewards: RewardWorkers,
    tokenizer: Tokenizer,
    table: EvaluationConfig,
    mesh: ProcessMesh | None = None,
) -> EvaluatedPrompts:
    """pass@k of completions, table.num_generations for each prompt.

    A completion passes if the first function of `rewards` gives at least table.pass_threshold; one
    whose reward fails does not pass. The processes of `mesh` share the scoring; collective.
    """
    mesh = mesh or ProcessMesh()
    rollouts = [own for group in groups for own in group]
    found = [own.to_sample(tokenizer) for own in rollouts]
    share = mesh.share(len(found))
    own_scores = [own[0] for own in rewards.score(found[share.start : share.stop])]
    given: list[Score] = list(chain.from_iterable(mesh.gather(own_scores, "data")))
    scores = [own.failure or score for own, score in zip(rollouts, given, strict=True)]
    passes = [isinstance(own, float) and own >= table.pass_threshold for own in scores]
    n = table.num_generations
    counts = [sum(passes[first : first + n]) for first in range(0, len(passes), n)]
    by_k = {k: [pass_at_k(n, count, k) for count in counts] for k in table.pass_at}
    known = [own for own in scores if isinstance(own, float)]
    record = PassAtKRecord(
        num_prompts=len(groups),
        num_generations=n,
        pass_at={str(k): statistics.fmean(own) for k, own in by_k.items()},
        stderr={str(k): _standard_error(own) for k, own in by_k.items()},
        score=statistics.fmean(known) if known else math.nan,
        length=statistics.fmean(own.num_sampled for own in rollouts),
        truncated=statistics.fmean(own.is_truncated for own in rollouts),
        failed=len(scores) - len(known),
    )
    samples = [
        {
            "prompt": own.prompt.prompt,
            "completion": own.text(tokenizer),
            "tokens": own.num_sampled,
            "is_truncated": own.is_truncated,
            "score": score if isinstance(score, float) else str(score),
            "passes": own_passes,
        }
        for own, score, own_passes in zip(rollouts, scores, passes, strict=True)
    ]
    failure = next((own for own in scores if isinstance(own, RewardFailure)), None)
    return EvaluatedPrompts(record, samples, failure)


class HeldOutEvaluation:
    """Evaluations of a GRPO phase by its engine. All have the same random numbers, so that they
    differ by the weights alone.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        table: EvaluationConfig,
        *,
        prompts: Sequence[PromptRecord],
        max_tokens: int,
        distribution: SamplingDistribution,
        tokenizer: Tokenizer,
        rewards: RewardWorkers,
        samples: Path,
        mesh: ProcessMesh | None = None,
    ) -> None:
        """samples: folder of the files of samples; mesh: its processes share the prompts."""
        self._mesh = mesh or ProcessMesh()
        self._engine = engine
        self._table = table
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._distribution = distribution
        self._tokenizer = tokenizer
        self._rewards = rewards
        self._samples = samples

    def run(self, step: int) -> EvaluatedPrompts:
        """Evaluate the weights after `step` optimizer steps, and write the samples; collective."""
        share = self._mesh.share(len(self._prompts))
        own = self._engine.generate(
            self._prompts[share.start : share.stop],
            share.start,
            num_generations=self._table.num_generations,
            max_tokens=self._max_tokens,
            distribution=self._distribution,
            purpose=EVALUATION,
        )
        groups = list(chain.from_iterable(self._mesh.gather(own, "data")))
        found = evaluate_completions(
            groups, self._rewards, self._tokenizer, self._table, self._mesh
        )
        if self._mesh.is_main_process:
            write_samples(self._samples / f"held-out-{step:08}.jsonl", found.samples)
        return found


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean over prompts; NaN for one prompt."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))
