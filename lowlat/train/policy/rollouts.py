"""Rollouts: completions of a group per prompt, sampled by lowlat's own engine in the training
process with the policy's weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from lowlat.data.shuffle import mixed, permutation
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import RequestOptions, TokenEvent
from lowlat.engine.runner import ModelRunner
from lowlat.engine.scheduler import MAX_SEQUENCES, Limits
from lowlat.model.transformer import Transformer
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.policy.distribution import SamplingDistribution
from lowlat.train.policy.forward import PolicySequence
from lowlat.train.policy.prompts import PromptRecord
from lowlat.train.policy.scoring import BackgroundScoring
from lowlat.train.policy.tools import RolloutTool, tool_message_ids
from lowlat.train.rewards.sample import RewardFailure, Sample, ToolAnswer
from lowlat.utils.errors import UserError

SAMPLING, EVALUATION = 1, 2
"""Purposes of sampling, training and held-out prompts; each has random numbers of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled completion, of several turns if a tool answers."""

    prompt: PromptRecord
    completion: tuple[int, ...]
    """Token ids, with the end-of-sequence token if it was sampled, and with tool messages."""
    logprobs: tuple[float, ...]
    """Log-probability of each sampled token by the logits that it was sampled from, before
    temperature and filters.
    """
    is_truncated: bool
    """Whether it reached max_completion_length."""
    inserted: tuple[range, ...] = ()
    """Places in `completion` of each tool message, with the template's tokens around it."""
    messages: tuple[dict[str, str], ...] = ()
    """The turns before the last one, each with its tool message."""
    failure: RewardFailure | None = None
    """Why the tool gave no answer, which leaves the completion without a reward."""

    @property
    def num_sampled(self) -> int:
        """Tokens of the completion that the model sampled."""
        return len(self.completion) - sum(map(len, self.inserted))

    def turns(self) -> Iterator[tuple[PolicySequence, tuple[float, ...]]]:
        """Each turn as a sequence, whose prompt is all that the engine sampled it from, and the
        log-probabilities of its tokens.
        """
        first = used = 0
        end = len(self.completion)
        for gap in (*self.inserted, range(end, end)):
            sampled = self.completion[first : gap.start]
            if sampled:
                prompt = (*self.prompt.ids, *self.completion[:first])
                logprobs = self.logprobs[used : used + len(sampled)]
                yield PolicySequence(prompt=prompt, completion=sampled), logprobs
            first, used = gap.stop, used + len(sampled)

    def to_sample(self, tokenizer: Tokenizer) -> Sample:
        """The last turn for reward functions: text without the end token, with special tokens such
        as reasoning tags.
        """
        prompt = self.prompt.prompt
        if not isinstance(prompt, str):
            prompt = [*prompt, *self.messages]
        first = self.inserted[-1].stop if self.inserted else 0
        return Sample(prompt, self.text(tokenizer, first), self.prompt.record, self.num_sampled)

    def text(self, tokenizer: Tokenizer, first: int = 0) -> str:
        """Text of the completion from token `first` on, with special tokens but without the end
        token.
        """
        ids = self.completion if self.is_truncated else self.completion[:-1]
        return tokenizer.decode(ids[first:], skip_special_tokens=False)


class RolloutEngine:
    """The engine over the policy's weights.

    A group depends on the weights, the seed and the number of its draw alone, so a rollout that was
    interrupted repeats with the same tokens.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        context: int,
        eos_ids: frozenset[int],
        seed: int,
        tool: RolloutTool | None = None,
    ) -> None:
        """context: most tokens of a prompt with its completion; tool: answers turns."""
        self._engine = Engine(
            ModelRunner(model),
            context=context,
            eos_ids=eos_ids,
            limits=Limits(max_sequences=MAX_SEQUENCES),
        )
        self._seed = seed
        self._tool = tool

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
        params = TokenSamplingParams(
            max_tokens=max_tokens,
            temperature=distribution.temperature,
            top_k=distribution.top_k,
            top_p=distribution.top_p,
            min_p=distribution.min_p,
            logprobs=0,
            n=num_generations,
        )
        seeds = partial(draw_seed, self._seed, purpose=purpose)
        sampling = GroupSampling(self._engine, self._tool, params, seeds, finished)
        for place, prompt in enumerate(prompts):
            sampling.add(place, first_draw + place, prompt)
        return sampling.run()


@dataclass(kw_only=True, slots=True)
class OpenCompletion:
    """A completion that is being sampled; fields as in `Rollout`."""

    place: int
    """Of its group."""
    draw: int
    index: int
    """Of the completion in its group."""
    prompt: PromptRecord
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    inserted: list[range] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)

    def rollout(
        self, *, is_truncated: bool = False, failure: RewardFailure | None = None
    ) -> Rollout:
        """The completion as it is."""
        return Rollout(
            prompt=self.prompt,
            completion=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            is_truncated=is_truncated,
            inserted=tuple(self.inserted),
            messages=tuple(self.messages),
            failure=failure,
        )


class GroupSampling:
    """Samples groups of completions; turns that a tool answers continue as requests of their own,
    while the engine samples others.
    """

    def __init__(
        self,
        engine: Engine,
        tool: RolloutTool | None,
        params: TokenSamplingParams,
        seeds: Callable[..., int],
        finished: Callable[[int, list[Rollout]], None] | None,
    ) -> None:
        """params: of a group, without a seed; seeds: `draw_seed` of a draw and a turn; finished: as
        of `RolloutEngine.generate`.
        """
        self._engine = engine
        self._tool = tool
        self._params = params
        self._seeds = seeds
        self._finished = finished
        self._options = RequestOptions(is_offline=True)
        self._running: dict[tuple[int, int], OpenCompletion] = {}
        """By request id and index."""
        self._called: dict[int, OpenCompletion] = {}
        """Whose last turn the tool has, by the number of the call."""
        self._num_calls = 0
        self._groups: dict[int, dict[int, Rollout]] = {}

    def add(self, place: int, draw: int, prompt: PromptRecord) -> None:
        """Queue group `place`, draw number `draw`."""
        params = replace(self._params, seed=self._seeds(draw))
        request = self._engine.add(prompt.ids, params, self._options)
        self._groups[place] = {}
        for index in range(params.n):
            own = OpenCompletion(place=place, draw=draw, index=index, prompt=prompt)
            self._running[request.id, index] = own

    def run(self) -> list[list[Rollout]]:
        """The groups by place. Raises UserError if the model fails."""
        if self._tool is None:
            while self._engine.has_work:
                self._step(None)
        else:
            with closing(BackgroundScoring(self._tool.workers.score)) as calls:
                while self._engine.has_work or self._called:
                    if self._engine.has_work:
                        self._step(calls)
                    for number, ((answer,),) in calls.finished(
                        waits=not self._engine.has_work
                    ).items():
                        self._continue(self._called.pop(number), answer)
        count = self._params.n
        return [[group[n] for n in range(count)] for _, group in sorted(self._groups.items())]

    def _step(self, calls: BackgroundScoring[ToolAnswer] | None) -> None:
        """Run a step of the engine; turns that end go to the tool."""
        for event in self._engine.step():
            own = self._running[event.request_id, event.index]
            _record(event, own)
            if event.finish_reason is None:
                continue
            del self._running[event.request_id, event.index]
            is_truncated = event.finish_reason == "length"
            if (
                is_truncated
                or calls is None
                or self._tool is None
                or len(own.inserted) == self._tool.max_iterations
            ):
                self._end(own, own.rollout(is_truncated=is_truncated))
                continue
            self._called[self._num_calls] = own
            calls.add(self._num_calls, [own.rollout().to_sample(self._tool.tokenizer)])
            self._num_calls += 1

    def _continue(self, own: OpenCompletion, answer: ToolAnswer) -> None:
        """Continue after the tool's answer, if there is one."""
        if not isinstance(answer, str):
            return self._end(own, own.rollout(failure=answer))
        assert self._tool is not None and self._params.max_tokens is not None
        tokenizer = self._tool.tokenizer
        turn = own.rollout().to_sample(tokenizer).completion
        ids = tool_message_ids(tokenizer, own.prompt, answer)
        left = self._params.max_tokens - len(own.tokens)
        own.messages += [
            {"role": "assistant", "content": turn},
            {"role": "tool", "content": answer},
        ]
        own.inserted.append(range(len(own.tokens), len(own.tokens) + min(left, len(ids))))
        own.tokens += ids[:left]
        if len(ids) >= left:
            return self._end(own, own.rollout(is_truncated=True))
        seed = self._seeds(own.draw, own.index, len(own.inserted))
        params = replace(self._params, max_tokens=left - len(ids), n=1, seed=seed)
        prompt = (*own.prompt.ids, *own.tokens)
        self._running[self._engine.add(prompt, params, self._options).id, 0] = own

    def _end(self, own: OpenCompletion, rollout: Rollout) -> None:
        group = self._groups[own.place]
        group[own.index] = rollout
        if len(group) == self._params.n and self._finished is not None:
            self._finished(own.place, [group[n] for n in range(self._params.n)])


def _record(event: TokenEvent, own: OpenCompletion) -> None:
    if event.error is not None:
        raise UserError(f"a rollout failed: {event.error}; lower learning_rate")
    if event.token is not None:
        assert event.logprob is not None
        own.tokens.append(event.token)
        own.logprobs.append(event.logprob)


def draw_seed(seed: int, draw: int, *turn: int, purpose: int = SAMPLING) -> int:
    """Seed of the sampling of draw number `draw`; turn: completion and number of a later turn."""
    return int(mixed(np.array([draw]), seed, purpose, *turn)[0] >> np.uint64(1))


def drawn(prompts: Sequence[PromptRecord], draw: int, seed: int) -> PromptRecord:
    """The prompt of draw number `draw`: every epoch has its own random order."""
    epoch, place = divmod(draw, len(prompts))
    return prompts[int(permutation(len(prompts), seed, epoch)[place])]
