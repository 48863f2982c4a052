"""How many drafts pay: acceptance and the cost of a step, measured as they come.

Owns the estimates. A draft pays while the tokens it is expected to yield cost less than tokens cost
without it; a round of them must also pay for what making any drafts costs. Where none does, none is
made, and from time to time one is tried again.
"""

import heapq
import weakref
from collections.abc import Mapping

from lowlat.engine.request import Sequence

MAX_DRAFT_TOKENS = 4
"""Drafts of a sequence in one step."""
PRIOR = 0.5
"""Acceptance expected before any draft was verified."""
MEMORY = 0.9
"""Weight of what was known of a sequence's acceptance at each new outcome."""
COMMON_MEMORY = 0.99
"""The same of the acceptance of all, which new sequences begin with."""
RETURN = 0.002
"""How far the estimate goes towards 1 in each step without drafts: so the next try comes."""
COST_MEMORY = 0.98
"""Weight of earlier steps in the estimate of cost."""
OUTLIER = 4.0
"""Times the expected cost that a step counts for at most: the machine may have been busy."""
RETRY = 256
"""Steps without drafts after which their cost is forgotten, as it may have been so at that time."""


class StepCost:
    """Seconds of a step as a + b n, n tokens: least squares in which earlier steps fade.

    Where steps of one size only were seen, one token more is taken to cost `share` of a step, or
    its own part of it.
    """

    def __init__(self, share: float = 1.0) -> None:
        self._share = share
        self._count = self._n = self._nn = self._t = self._nt = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Learn that a step of `num_tokens` took so long."""
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
        """Whether anything was added."""
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
    """Shares out drafts among the sequences of a step where they are worth most."""

    def __init__(self) -> None:
        self._cost = StepCost(share=0.1)
        # Each draft is a run of a module of its own.
        self._drafting = StepCost()
        self._step = 0
        self._last_drafts = 0
        """The step in which drafts were made last."""
        self._common = PRIOR
        self._acceptance: weakref.WeakKeyDictionary[Sequence, tuple[float, int]] = (
            weakref.WeakKeyDictionary()
        )
        """As it was in which step."""

    def acceptance(self, sequence: Sequence) -> float:
        """The chance that a draft of this sequence is kept, given that those before it were."""
        known, step = self._acceptance.setdefault(sequence, (self._common, self._step))
        return 1.0 - (1.0 - known) * (1.0 - RETURN) ** (self._step - step)

    def choose(self, most: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """How many drafts each sequence should make, at most `most`."""
        self._step += 1
        if self._step - self._last_drafts > RETRY:
            self._drafting = StepCost()
        depths = self._shares(most)
        if any(depths.values()):
            self._last_drafts = self._step
        return depths

    def _shares(self, most: Mapping[Sequence, int]) -> dict[Sequence, int]:
        depths = dict.fromkeys(most, 0)
        base, slope = self._cost.estimate()
        # Until drafts were made they are taken to cost nothing, so that they are tried.
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
            # A token for `slope` seconds beats tokens / seconds, or no further one does either.
            if -gain * seconds <= slope * tokens:
                break
            depths[sequence] += 1
            tokens, seconds = tokens - gain, seconds + slope
            if depths[sequence] < min(MAX_DRAFT_TOKENS, most[sequence]):
                heapq.heappush(gains, (gain * self.acceptance(sequence), place, sequence))
        if tokens * plain <= len(most) * seconds:
            return dict.fromkeys(most, 0)
        return depths

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Learn from the drafts of a sequence: `accepted` were kept, the next one was not."""
        known = self.acceptance(sequence)
        for place in range(min(accepted + 1, drafted)):
            is_kept = place < accepted
            known = MEMORY * known + (1.0 - MEMORY) * is_kept
            self._common = COMMON_MEMORY * self._common + (1.0 - COMMON_MEMORY) * is_kept
        self._acceptance[sequence] = (known, self._step)

    def stepped(self, num_tokens: int, seconds: float) -> None:
        """Learn what a step costs, without the making of drafts."""
        self._cost.add(num_tokens, seconds)

    def drafted(self, num_drafts: int, seconds: float) -> None:
        """Learn what making drafts for a step costs."""
        self._drafting.add(num_drafts, seconds)
