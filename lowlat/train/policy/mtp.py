"""MTP loss (DeepSeek-V3 section 2.2) on sampled completions, so that drafts follow the policy.

Modules run in PyTorch at the policy's hidden states and learn to predict what it sampled. The loss
has no gradient by those states, the embedding and the head: rewards alone train the policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int
from torch import Tensor
from torch.func import functional_call

from lowlat.attention.flash import FlashAttention
from lowlat.model.expert_loads import gates
from lowlat.model.transformer import Transformer
from lowlat.ops.cross_entropy import linear_cross_entropy
from lowlat.ops.routing import Routing
from lowlat.train.policy.forward import PolicyPass, PolicySequence
from lowlat.train.policy.weights import PolicyWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class MTPFigures:
    """Of one pass."""

    losses: list[float]
    """Sum of the negative log-likelihoods of each module's targets, nats."""
    experts: dict[int, Float64[Tensor, " experts"]]
    """Choices of every expert of the modules, whose layers are counted after the decoder's."""


class MTPTraining:
    """Forward and backward passes of the MTP modules of `weights`."""

    def __init__(self, weights: PolicyWeights, model: Transformer) -> None:
        """model: on the meta device, computes with tensors of `weights`."""
        self._weights = weights
        self._model = model
        self._experts: dict[int, Tensor] = {}
        for layer, gate in gates(model):
            if layer >= weights.config.num_hidden_layers:
                gate.register_forward_hook(self._counter(layer, gate.moe.n_routed_experts))

    def run(
        self,
        run: PolicyPass,
        sequences: Sequence[PolicySequence],
        is_counted: Sequence[bool],
        factors: Sequence[float],
    ) -> MTPFigures:
        """Add the gradients of the loss of `sequences`, whose pass is `run`, to those of the master
        weights. is_counted: which take part; factors: weight of a target of each module.
        """
        config, embedding = self._model.config, self._model.embed_tokens
        embeddings = self._weights.tensors["embed_tokens.weight"]
        head = (
            embeddings if self._model.lm_head is None else self._weights.tensors["lm_head.weight"]
        )
        attention = FlashAttention(run.lengths)
        tables = self._model.rotary(attention.positions())
        hidden, losses = run.hidden, []
        self._experts = {}
        with torch.enable_grad():
            total = torch.zeros(())
            for depth, (module, factor) in enumerate(zip(self._model.mtp, factors, strict=True)):
                ahead, targets, counted = _shifted(sequences, is_counted, depth)
                embedded = F.embedding(ahead, embeddings) * embedding.factor
                rope = self._model.rotary.of(config.num_hidden_layers + depth, tables)
                own = self._weights.differentiable(f"mtp.{depth}.")
                given = hidden, embedded.to(hidden.dtype), rope, attention
                hidden = functional_call(module, own, given)
                found = linear_cross_entropy(hidden, head, targets, counted)
                losses.append(float(found.nll))
                total = total + found.total * factor
            total.backward()
        return MTPFigures(losses=losses, experts=self._experts)

    def _counter(self, layer: int, num_experts: int):
        def hook(_module: object, _inputs: object, routing: Routing) -> None:
            counts = torch.bincount(routing.experts.flatten(), minlength=num_experts)
            self._experts[layer] = counts.double()

        return hook


def num_targets(sequences: Sequence[PolicySequence], depth: int) -> int:
    """Sampled tokens of `sequences` that module `depth`, from 0, predicts."""
    return sum(max(0, len(own.completion) - _missing(own, depth)) for own in sequences)


def _missing(sequence: PolicySequence, depth: int) -> int:
    """First tokens of the completion that module `depth` cannot predict: it needs depth + 2 tokens
    before its target.
    """
    return max(0, depth + 2 - len(sequence.prompt))


def _shifted(
    sequences: Sequence[PolicySequence], is_counted: Sequence[bool], depth: int
) -> tuple[Int[Tensor, "tokens"], Int[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """For every input of the packed `sequences` the tokens depth + 1 and depth + 2 places after it,
    and whether the latter is a target; 0 and none past the end.
    """
    ahead: list[int] = []
    targets: list[int] = []
    counted: list[bool] = []
    for own, counts in zip(sequences, is_counted, strict=True):
        size, first = len(own.inputs), len(own.prompt) - depth - 2
        tokens = [*own.prompt, *own.completion, *[0] * (depth + 1)]
        ahead += tokens[depth + 1 : depth + 1 + size]
        targets += tokens[depth + 2 : depth + 2 + size]
        counted += [counts and first <= place < size - depth - 1 for place in range(size)]
    return torch.tensor(ahead), torch.tensor(targets), torch.tensor(counted)
