"""Auxiliary-loss-free load balancing of experts (arXiv 2408.15664): expert load statistics,
selection bias updates, and the sequence-wise balance loss (aux loss, DeepSeek-V3 section 2.1.2).

A hook on every gate observes its routing; the model itself has no code for it.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.model.expert_loads import gates
from lowlat.model.moe import Gate
from lowlat.model.transformer import Transformer
from lowlat.ops.routing import Routing
from lowlat.train.metrics.record import ExpertRecord
from lowlat.train.parallel.collectives import applied
from lowlat.train.parallel.mesh import TOKEN_AXES, ProcessMesh
from lowlat.train.parallel.pipeline_gather import AXIS as PIPELINE
from lowlat.train.parallel.pipeline_gather import gather_along_pipeline


class _Observed:
    """Counters of one gate."""

    def __init__(self, layer: int, gate: Gate) -> None:
        self.layer = layer
        self.gate = gate
        # choices per expert
        experts = gate.moe.n_routed_experts
        self.counters = torch.zeros(experts, dtype=torch.float64, device=gate.weight.device)


class LoadBalancer:
    """Hooks on every gate of a model for the duration of training.

    `sequence_weight` is alpha of the sequence-wise balance loss; `mesh` divides the batches.
    """

    def __init__(
        self, model: Transformer, *, sequence_weight: float, mesh: ProcessMesh | None = None
    ) -> None:
        self.sequence_weight = sequence_weight
        self._mesh = mesh or ProcessMesh()
        self._sequence_length = 0
        self._num_sequences = 0
        # On the model's device even without gates: the all-reduce needs it in every process.
        device = next(model.parameters()).device
        self._sequence_loss = torch.zeros((), dtype=torch.float64, device=device)
        self._enabled = False
        self._gates: list[_Observed] = []
        for layer, gate in gates(model):
            observed = _Observed(layer, gate)
            gate.register_forward_hook(self._hook(observed))
            self._gates.append(observed)

    @contextmanager
    def observe(self, *, sequence_length: int, num_sequences: int) -> Iterator[None]:
        """Observe a global batch of `num_sequences` sequences of `sequence_length` tokens; passes
        outside are not counted.
        """
        self._sequence_length, self._num_sequences = sequence_length, num_sequences
        self._reset()
        self._enabled = True
        try:
            yield
        finally:
            self._enabled = False

    def set_loads(self, loads: Mapping[int, Float[Tensor, " experts"]]) -> None:
        """Set the expert loads (tokens per expert), by layer, of a batch that no hook observed."""
        self._reset()
        for observed in self._gates:
            if observed.layer in loads:
                observed.counters += loads[observed.layer]

    def _reset(self) -> None:
        self._sequence_loss.zero_()
        for observed in self._gates:
            observed.counters.zero_()

    def reduce(self) -> None:
        """All-reduce the counters, once per global batch."""
        counters = [observed.counters for observed in self._gates]
        own = [*counters, self._sequence_loss[None]] if counters else []
        if own:
            sizes = [len(part) for part in own]
            *sums, loss = self._mesh.sum(torch.cat(own), TOKEN_AXES).split(sizes)
            for observed, total in zip(self._gates, sums, strict=True):
                observed.counters.copy_(total)
            self._sequence_loss.copy_(loss[0])
        self._sequence_loss.copy_(self._mesh.sum(self._sequence_loss, (PIPELINE,)))

    @property
    def sequence_loss(self) -> float:
        """The sequence-wise balance loss of the batch, summed over layers, alpha included."""
        return self._sequence_loss.item()

    @torch.no_grad()
    def update_biases(self, speed: float) -> None:
        """Auxiliary-loss-free balancing: b_i += speed * sign(mean load - load_i) with the loads of
        the whole batch; once per step.
        """
        for observed in self._gates:
            bias = observed.gate.e_score_correction_bias
            if bias is not None and speed > 0:
                load = observed.counters
                bias += speed * (load.mean() - load).sign().to(bias.dtype)

    def loads(self) -> list[ExpertRecord]:
        """Expert loads of every MoE layer over the batch; collective."""
        own = ((str(observed.layer), _counters_and_bias(observed)) for observed in self._gates)
        gathered = gather_along_pipeline(self._mesh, own)
        loads = [_expert_record(int(layer), numbers) for layer, numbers in gathered]
        return sorted(loads, key=lambda load: load.layer)

    def _hook(self, observed: _Observed) -> Any:
        def hook(_module: nn.Module, _inputs: Any, routing: Routing) -> Routing | None:
            if not self._enabled:
                return None
            if not _in_backward():
                self._count(observed, routing)
            if self.sequence_weight == 0 or not routing.weights.requires_grad:
                return None
            loss = self._sequence_wise(observed.gate, routing)
            if not _in_backward():
                self._sequence_loss += loss.detach()
            return routing._replace(weights=with_loss(routing.weights, loss))

        return hook

    @torch.no_grad()
    def _count(self, observed: _Observed, routing: Routing) -> None:
        experts = observed.gate.moe.n_routed_experts
        observed.counters += torch.bincount(routing.experts.flatten(), minlength=experts)

    def _sequence_wise(self, gate: Gate, routing: Routing) -> Float[Tensor, ""]:
        parts = self._mesh.size("context")
        scores = routing.scores.unflatten(0, (-1, self._sequence_length // parts))
        frequency = self._mesh.sum(
            choice_frequency(scores, gate.moe.num_experts_per_tok), ("context",)
        )
        # sum_i f_i P_i (DeepSeek-V3 equations 17 to 20). Both factors are means over this process's
        # part of a sequence, one of `parts` equal parts.
        losses = (frequency * mean_share(scores)).sum(dim=-1) / parts**2
        return self.sequence_weight / self._num_sequences * losses.sum()


def choice_frequency(
    scores: Float[Tensor, "sequences length experts"], chosen: int
) -> Float[Tensor, "sequences experts"]:
    """f_i of every sequence (DeepSeek-V3 equation 18): how often an expert is among the top
    `chosen` scores of a token without the routing bias, normalized to a mean of 1.
    """
    sequences, length, num_experts = scores.shape
    counts = scores.new_zeros(sequences, num_experts)
    flat = scores.detach().topk(chosen, dim=-1).indices.flatten(1)
    counts.scatter_add_(1, flat, scores.new_ones(()).expand(flat.shape))
    return counts * (num_experts / (chosen * length))


def mean_share(
    scores: Float[Tensor, "sequences length experts"],
) -> Float[Tensor, "sequences experts"]:
    """P_i of every sequence (DeepSeek-V3 equations 19 and 20): mean normalised scores."""
    return (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)


def with_loss(weights: Float[Tensor, "*shape"], loss: Float[Tensor, ""]) -> Tensor:
    """`weights`; a backward pass through them is also one of `loss`."""
    return applied(_AddLoss, weights, loss)


class _AddLoss(torch.autograd.Function):
    """Identity on weights that adds a loss to whatever is differentiated."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return weights.view_as(weights)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


def _in_backward() -> bool:
    """Whether activation checkpointing is recomputing a layer, which was already counted."""
    return torch._C._current_graph_task_id() != -1


def _counters_and_bias(observed: _Observed) -> Float[Tensor, "numbers"]:
    """The counters of a gate, then the bounds of its bias; zeros without a bias."""
    bias = observed.gate.e_score_correction_bias
    bounds = observed.counters.new_zeros(2)
    if bias is not None:
        bounds = torch.stack([bias.min(), bias.max()]).to(bounds)
    return torch.cat([observed.counters, bounds])


def _expert_record(layer: int, numbers: Float[Tensor, "numbers"]) -> ExpertRecord:
    counts, (lowest, highest) = numbers[:-2], numbers[-2:].tolist()
    load = counts / counts.sum().clamp(min=1)
    return ExpertRecord(
        layer=layer,
        load=tuple(load.tolist()),
        max_violation=(load.max() * len(load) - 1).item(),
        entropy=(-torch.xlogy(load, load).sum() / math.log(max(2, len(load)))).item(),
        bias_min=lowest,
        bias_max=highest,
    )
