"""Rollouts: completions of a group per prompt, sampled by lowlat's own engine in the training
process with the policy's weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lowlat.data.shuffle import mixed, permutation
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import Request, RequestOptions, TokenEvent
from lowlat.engine.runner import ModelRunner
from lowlat.engine.scheduler import MAX_SEQUENCES, Limits
from lowlat.model.transformer import Transformer
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.policy.distribution import SamplingDistribution
from lowlat.train.policy.prompts import PromptRecord
from lowlat.train.rewards.sample import Sample
from lowlat.utils.errors import UserError

SAMPLING, EVALUATION = 1, 2
"""Purposes of sampling, training and held-out prompts; each has random numbers of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled completion."""

    prompt: PromptRecord
    completion: tuple[int, ...]
    """Token ids, with the end-of-sequence token if it was sampled."""
    logprobs: tuple[float, ...]
    """Log-probability of each token by the logits that it was sampled from, before temperature and
    filters.
    """
    is_truncated: bool
    """Whether it reached max_completion_length."""

    def to_sample(self, tokenizer: Tokenizer) -> Sample:
        """The completion for reward functions: text without the end token, with special tokens such
        as reasoning tags.
        """
        ids = self.completion if self.is_truncated else self.completion[:-1]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        return Sample(self.prompt.prompt, text, self.prompt.record, len(self.completion))


class RolloutEngine:
    """The engine over the policy's weights.

    A group depends on the weights, the seed and the number of its draw alone, so a rollout that was
    interrupted repeats with the same tokens.
    """

    def __init__(
        self, model: Transformer, *, context: int, eos_ids: frozenset[int], seed: int
    ) -> None:
        """context: most tokens of a prompt with its completion."""
        self._engine = Engine(
            ModelRunner(model),
            context=context,
            eos_ids=eos_ids,
            limits=Limits(max_sequences=MAX_SEQUENCES),
        )
        self._seed = seed

    def refresh(self) -> None:
        """Take over updated weights."""
        self._engine.refresh_weights()

    def generate(
        self,
        prompts: Sequence[PromptRecord],
        first_draw: int,
        *,
        num_generations: int,
        max_tokens: int,
        distribution: SamplingDistribution,
        purpose: int = SAMPLING,
        finished: Callable[[int, list[Rollout]], None] | None = None,
    ) -> list[list[Rollout]]:
        """A group of completions for each of `prompts`, which are draws first_draw, .... Raises
        UserError if the model fails.

        purpose: SAMPLING or EVALUATION. finished: called with the place and the completions of
        each group that is complete, while others are sampled.
        """
        requests: list[Request] = []
        options = RequestOptions(is_offline=True)
        for place, prompt in enumerate(prompts):
            params = TokenSamplingParams(
                max_tokens=max_tokens,
                temperature=distribution.temperature,
                top_k=distribution.top_k,
                top_p=distribution.top_p,
                min_p=distribution.min_p,
                seed=draw_seed(self._seed, first_draw + place, purpose),
                logprobs=0,
                n=num_generations,
            )
            requests.append(self._engine.add(prompt.ids, params, options))
        logprobs: dict[tuple[int, int], list[float]] = {}
        places = {request.id: place for place, request in enumerate(requests)}
        running = [num_generations] * len(requests)
        groups: dict[int, list[Rollout]] = {}
        while self._engine.has_work:
            for event in self._engine.step():
                _record(event, logprobs)
                place = places[event.request_id]
                running[place] -= event.finish_reason is not None
                if running[place] == 0:
                    groups[place] = _group(prompts[place], requests[place], logprobs)
                    if finished is not None:
                        finished(place, groups[place])
        return [groups[place] for place in range(len(requests))]


def draw_seed(seed: int, draw: int, purpose: int = SAMPLING) -> int:
    """Seed of the sampling of draw number `draw`."""
    return int(mixed(np.array([draw]), seed, purpose)[0] >> np.uint64(1))


def drawn(prompts: Sequence[PromptRecord], draw: int, seed: int) -> PromptRecord:
    """The prompt of draw number `draw`: every epoch has its own random order."""
    epoch, place = divmod(draw, len(prompts))
    return prompts[int(permutation(len(prompts), seed, epoch)[place])]


def _record(event: TokenEvent, logprobs: dict[tuple[int, int], list[float]]) -> None:
    if event.error is not None:
        raise UserError(f"a rollout failed: {event.error}; lower learning_rate")
    if event.token is not None:
        assert event.logprob is not None
        logprobs.setdefault((event.request_id, event.index), []).append(event.logprob)


def _group(
    prompt: PromptRecord, request: Request, logprobs: dict[tuple[int, int], list[float]]
) -> list[Rollout]:
    return [
        Rollout(
            prompt=prompt,
            completion=tuple(sequence.tokens[len(request.prompt) :]),
            logprobs=tuple(logprobs[request.id, sequence.index]),
            is_truncated=sequence.finish_reason == "length",
        )
        for sequence in request.sequences
    ]
