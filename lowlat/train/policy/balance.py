"""Sequence-wise balance loss (DeepSeek-V3 section 2.1.2) of sampled sequences of any lengths."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lowlat.model.moe import Gate
from lowlat.ops.routing import Routing
from lowlat.train.step.balance import choice_frequency, mean_share, with_loss


class SequenceBalance:
    """Hooks on gates that run packed sequences: the loss is differentiated with their weights."""

    def __init__(self) -> None:
        self.weight = 0.0
        """Of a sequence: alpha over the number of sequences; 0 for no loss."""
        self.lengths: Sequence[int] = ()
        """Tokens of the sequences of a pass."""
        self.loss = 0.0
        """Sum over gates and passes, alpha included."""

    def watch(self, gate: Gate) -> None:
        """Add the loss of `gate`."""
        gate.register_forward_hook(self._hook)

    def _hook(self, gate: nn.Module, _inputs: Any, routing: Routing) -> Routing | None:
        assert isinstance(gate, Gate)
        if not self.weight:
            return None
        loss = routing.scores.new_zeros(())
        for scores in routing.scores.split(list(self.lengths)):
            frequency = choice_frequency(scores[None], gate.moe.num_experts_per_tok)
            loss = loss + (frequency * mean_share(scores[None])).sum()
        loss = self.weight * loss
        self.loss += loss.item()
        return routing._replace(weights=with_loss(routing.weights, loss))
