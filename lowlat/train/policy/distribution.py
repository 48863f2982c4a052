"""Log-probabilities under the distribution that completions are sampled from: temperature, top-k,
top-p and min-p; their gradients by the logits, and entropy. fp64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from lowlat.ops.sampling import kept_weights

Masks = Sequence[Int[Tensor, " _"]]
"""Per row, ids of the tokens that the filters kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDistribution:
    """Options of the sampler (`engine.params.TokenSamplingParams`)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_truncated(self) -> bool:
        """Whether tokens may have no probability."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    def masks(self, logits: Float[Tensor, "rows vocab"]) -> Masks | None:
        """The sampling masks of `logits`; None if all tokens are kept. DeepSeek-V3.2 (Keep Sampling
        Mask): the masks of the policy that sampled apply to every later one.
        """
        if not self.is_truncated:
            return None
        options = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        kept = (kept_weights(row, temperature=self.temperature, **options) for row in logits)
        return [weights.nonzero()[:, 0].int() for weights in kept]

    def log_probabilities(
        self, logits: Float[Tensor, "rows vocab"], masks: Masks | None
    ) -> Float64[Tensor, "rows vocab"]:
        """Natural logs of the probabilities of all tokens; -inf outside of `masks`."""
        scores = logits.double() / self.temperature
        if masks is not None:
            left_out = torch.ones_like(scores, dtype=torch.bool)
            for row, kept in zip(left_out, masks, strict=True):
                row[kept.long()] = False
            scores.masked_fill_(left_out, -torch.inf)
        return scores.log_softmax(dim=-1)

    def gradient(
        self,
        log_probabilities: Float64[Tensor, "rows vocab"],
        targets: Int[Tensor, "rows"],
        factors: Float64[Tensor, "rows"],
    ) -> Float64[Tensor, "rows vocab"]:
        """Gradient by the logits of the sum of the targets' log-probabilities times `factors`."""
        grad = log_probabilities.exp().mul_(-factors[:, None])
        grad.scatter_add_(1, targets[:, None], factors[:, None])
        return grad.div_(self.temperature)


def entropy(log_probabilities: Float64[Tensor, "rows vocab"]) -> Float64[Tensor, "rows"]:
    """Entropy of every row in nats."""
    return -(log_probabilities.exp() * log_probabilities.clamp(min=-1e9)).sum(dim=-1)
