"""Number of draft tokens per step (num_speculative_tokens in vLLM, here adaptive), from measured
acceptance rates and step costs.

Owns the estimates. A draft token is worth verifying if its expected output costs less time per
token than decoding without it. All draft tokens of a step must also cover the cost of drafting.
Otherwise the step drafts nothing; the policy retries from time to time.
"""

import heapq
import weakref
from collections.abc import Mapping

from lowlat.engine.request import Sequence

MAX_DRAFT_TOKENS = 4
"""Most draft tokens of a sequence in one step."""
PRIOR = 0.5
"""Acceptance rate assumed before the first verification."""
MEMORY = 0.9
"""Decay of the exponential moving average of a sequence's acceptance rate."""
COMMON_MEMORY = 0.99
"""Decay of the average over all sequences, from which new sequences start."""
RETURN = 0.002
"""Drift of the estimate towards 1 in each step without draft tokens, so that drafting is
retried."""
COST_MEMORY = 0.98
"""Decay of earlier steps in the cost estimate."""
OUTLIER = 4.0
"""A step counts for at most this multiple of its expected cost: the machine may be busy."""
RETRY = 256
"""Steps without draft tokens after which the estimated cost of drafting is reset."""


class StepCost:
    """Seconds of a step of n tokens as a + b n: exponentially weighted least squares.

    Until steps differ in size, b is assumed to be `share` of a step's cost, at most the mean cost
    of a token.
    """

    def __init__(self, share: float = 1.0) -> None:
        self._share = share
        self._count = self._n = self._nn = self._t = self._nt = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        if self.is_known:
            base, slope = self.estimate()
            seconds = min(seconds, OUTLIER * (base + slope * num_tokens))
        self._count = COST_MEMORY * self._count + 1.0
        self._n = COST_MEMORY * self._n + num_tokens
        self._nn = COST_MEMORY * self._nn + num_tokens * num_tokens
        self._t = COST_MEMORY * self._t + seconds
        self._nt = COST_MEMORY * self._nt + num_tokens * seconds

    @property
    def is_known(self) -> bool:
        return self._count > 0.0

    def estimate(self) -> tuple[float, float]:
        """(a, b), both at least 0 and not both 0."""
        if self._count == 0.0:
            return 1.0, self._share
        mean_n, mean_t = self._n / self._count, self._t / self._count
        spread = self._nn / self._count - mean_n**2
        if spread < 1e-3 * mean_n**2:
            slope = self._share * mean_t
        else:
            slope = (self._nt / self._count - mean_n * mean_t) / spread
        slope = min(max(slope, 0.0), mean_t / mean_n)
        return max(mean_t - slope * mean_n, 1e-9), slope


class DraftPolicy:
    """Distributes draft tokens among the sequences of a step by expected gain."""

    def __init__(self) -> None:
        self._cost = StepCost(share=0.1)
        # Each draft token is a run of an MTP module.
        self._drafting = StepCost()
        self._step = 0
        self._last_drafts = 0
        """The last step with draft tokens."""
        self._common = PRIOR
        self._acceptance: weakref.WeakKeyDictionary[Sequence, tuple[float, int]] = (
            weakref.WeakKeyDictionary()
        )
        """Per sequence: the average, and the step of its last update."""

    def acceptance(self, sequence: Sequence) -> float:
        """Estimated probability that a draft token is accepted, given that those before it were."""
        known, step = self._acceptance.setdefault(sequence, (self._common, self._step))
        return 1.0 - (1.0 - known) * (1.0 - RETURN) ** (self._step - step)

    def choose(self, most: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """Number of draft tokens for each sequence of the next step, at most `most`."""
        self._step += 1
        if self._step - self._last_drafts > RETRY:
            self._drafting = StepCost()
        num_drafts = self._shares(most)
        if any(num_drafts.values()):
            self._last_drafts = self._step
        return num_drafts

    def _shares(self, most: Mapping[Sequence, int]) -> dict[Sequence, int]:
        num_drafts = dict.fromkeys(most, 0)
        base, slope = self._cost.estimate()
        # Before the first measurement drafting is assumed to cost nothing, so that it is tried.
        round_cost, draft_cost = (
            self._drafting.estimate() if self._drafting.is_known else (0.0, 0.0)
        )
        plain = base + slope * len(most)
        tokens, seconds = float(len(most)), plain + round_cost
        slope += draft_cost
        gains = [
            (-self.acceptance(sequence), place, sequence)
            for place, sequence in enumerate(most)
            if most[sequence] > 0
        ]
        heapq.heapify(gains)
        while gains:
            gain, place, sequence = heapq.heappop(gains)
            # Stop unless this gain per second beats tokens / seconds: later gains are lower.
            if -gain * seconds <= slope * tokens:
                break
            num_drafts[sequence] += 1
            tokens, seconds = tokens - gain, seconds + slope
            if num_drafts[sequence] < min(MAX_DRAFT_TOKENS, most[sequence]):
                heapq.heappush(gains, (gain * self.acceptance(sequence), place, sequence))
        if tokens * plain <= len(most) * seconds:
            return dict.fromkeys(most, 0)
        return num_drafts

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Add a verification: `accepted` draft tokens were accepted, the next one was not."""
        known = self.acceptance(sequence)
        for place in range(min(accepted + 1, drafted)):
            is_accepted = place < accepted
            known = MEMORY * known + (1.0 - MEMORY) * is_accepted
            self._common = COMMON_MEMORY * self._common + (1.0 - COMMON_MEMORY) * is_accepted
        self._acceptance[sequence] = (known, self._step)

    def stepped(self, num_tokens: int, seconds: float) -> None:
        """Add the cost of a step, without drafting."""
        self._cost.add(num_tokens, seconds)

    def drafted(self, num_drafts: int, seconds: float) -> None:
        """Add the cost of drafting for a step."""
        self._drafting.add(num_drafts, seconds)
