"""Sampler: logits to tokens, with penalties, logit bias, grammar masks, top-k, top-p and min-p.

The order is: repetition, frequency and presence penalty, logit bias, token bans (min_tokens,
allowed_token_ids, bad words), grammar mask, temperature, top-k, top-p, min-p, draw; `ops.sampling`
implements the last five. The order is fixed: there is no list of logits processors. Probabilities
are computed in fp64 on the CPU from fp32 logits. A sequence draws one number per token from its own
generator, so its tokens do not depend on the batch composition. Equal scores rank by token id,
lowest first.
Log-probabilities (logprobs) are of the model's own logits.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lowlat.engine.constraint import ConstraintState
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.prompt_logprobs import PromptLogprob
from lowlat.engine.token_bans import TokenBans
from lowlat.ops import sampling


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token and, if requested, log-probabilities of the model itself."""

    token: int
    logprob: float | None = None
    """Natural log of the token's probability under the softmax of the raw logits."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, best first."""


class SequenceSampler:
    """Sampling state of one sequence: its parameters, its random generator, token counts for the
    penalties, and the state of its output constraint.

    `sample` and `record` mutate: call `record` once with every token that becomes part of the
    output.
    """

    def __init__(
        self,
        params: TokenSamplingParams,
        prompt: Sequence[int],
        index: int,
        vocab_size: int,
        constraint: ConstraintState | None = None,
        *,
        end_ids: frozenset[int] = frozenset(),
        bad_words: Sequence[tuple[int, ...]] = (),
    ) -> None:
        """end_ids, bad_words: see TokenBans."""
        self.params = params
        self.constraint = constraint
        # Text seeds are hashed whole: every (seed, index) pair starts an unrelated stream.
        self._random = random.Random(None if params.seed is None else f"{params.seed}:{index}")
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        bans = TokenBans(params, end_ids=end_ids, bad_words=bad_words, vocab_size=vocab_size)
        self._bans = bans if bans.any else None
        self._is_raw = (
            not params.has_penalties
            and not params.logit_bias
            and constraint is None
            and self._bans is None
        )
        if params.has_penalties:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(list(prompt), dtype=torch.int64)] = True
            self._counts = torch.zeros(vocab_size, dtype=torch.float32)

    def record(self, token: int) -> None:
        """Count `token` as part of the output."""
        if self.params.has_penalties:
            self._seen[token] = True
            self._counts[token] += 1
        if self._bans is not None:
            self._bans.record(token)
        if self.constraint is not None:
            self.constraint.accept(token)

    def sample(self, logits: Float[Tensor, " vocab"], best: int) -> SampledToken:
        """Sample from raw logits whose argmax is `best`."""
        params = self.params
        if params.is_greedy and self._is_raw and params.logprobs is None:
            return SampledToken(best)
        logits = logits.cpu()
        token = best if params.is_greedy and self._is_raw else self._choose(logits)
        if params.logprobs is None:
            return SampledToken(token)
        logprobs = torch.log_softmax(logits, dim=-1)
        top = ranked(logprobs, params.logprobs)[: params.logprobs] if params.logprobs else []
        return SampledToken(
            token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top)
        )

    def _choose(self, logits: Float[Tensor, " vocab"]) -> int:
        params = self.params
        if params.has_penalties:
            logits = apply_penalties(logits, self._seen, self._counts, params)
        if params.logit_bias:
            logits = logits.index_add(0, self._bias_ids, self._bias.to(logits.dtype))
        if self._bans is not None:
            logits = self._bans.apply(logits)
        if self.constraint is not None:
            logits = logits.masked_fill(~self.constraint.mask(), -math.inf)
        if params.is_greedy:
            return int(logits.argmax())
        return sampling.draw(
            logits,
            self._random.random(),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )


class StepLogits:
    """Logits of one step, [rows, vocab]; each row is sampled by one sequence."""

    def __init__(self, logits: Float[Tensor, "rows vocab"]) -> None:
        self._logits = logits
        self._is_finite = logits.amax(dim=-1).isfinite().tolist() if len(logits) > 0 else []
        self._best = logits.argmax(dim=-1).tolist() if len(logits) > 0 else []

    @torch.inference_mode()
    def sample(self, row: int, sampler: SequenceSampler) -> SampledToken | None:
        """A token sampled from `row`; None if its largest logit is NaN or infinite."""
        if not self._is_finite[row]:
            return None
        return sampler.sample(self._logits[row], self._best[row])

    @torch.inference_mode()
    def score(self, first: int, targets: Sequence[int], count: int) -> list[PromptLogprob]:
        """Log-probabilities of `targets`, predicted by the rows from `first` on, and of the `count`
        likeliest tokens.
        """
        logprobs = torch.log_softmax(self._logits[first : first + len(targets)].cpu(), dim=-1)
        chosen = logprobs.gather(1, torch.tensor(targets, dtype=torch.int64)[:, None])
        ranks = (logprobs > chosen).sum(dim=1) + 1
        scored = []
        for row, target, value, rank in zip(
            logprobs, targets, chosen.flatten().tolist(), ranks.tolist(), strict=True
        ):
            top = ranked(row, count)[:count] if count else []
            best = tuple((int(token), float(row[token])) for token in top)
            scored.append(PromptLogprob(target, value, rank, best))
        return scored


def apply_penalties(
    logits: Float[Tensor, " vocab"],
    seen: Bool[Tensor, " vocab"],
    counts: Float[Tensor, " vocab"],
    params: TokenSamplingParams,
) -> Float[Tensor, " vocab"]:
    """Repetition penalty, frequency penalty and presence penalty. seen: tokens of prompt and
    output; counts: occurrences in the output."""
    factor = params.repetition_penalty
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    logits = torch.where(seen, repeated, logits)
    return logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def ranked(scores: Float[Tensor, " vocab"], count: int) -> Int[Tensor, " ranked"]:
    """Ids of the `count` best scores (more if the last ones tie), best first, then
    lowest id first."""
    count = min(count, scores.shape[0])
    # topk does not define which of equal scores it returns, so it only finds the threshold.
    threshold = torch.topk(scores, count, sorted=False).values.min()
    ids = torch.nonzero(scores >= threshold).flatten()
    return ids[torch.sort(scores[ids], descending=True, stable=True).indices]
