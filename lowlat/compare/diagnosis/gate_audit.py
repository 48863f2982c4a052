"""Audit of the router: precision of its scores, rules of expert selection and routing weights."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowlat.compare.diagnosis.gate_reference import (
    CORRECT,
    GateVariant,
    gate_scores,
    ranking,
    selected_weights,
)
from lowlat.compare.diagnosis.mistakes import UNEXPLAINED, Mistake, StepAudit
from lowlat.compare.trace import Block, Trace
from lowlat.config.model import ModelConfig, MoEConfig
from lowlat.utils.device import dtype_name

TIE, CLOSE, ROUNDED = 1e-6, 1e-5, 2.0**-6
"""Difference of tied scores; relative difference of equal weights; the same after bf16 rounding."""
REPRODUCED, MISTAKEN = 0.5, 0.8
"""The config must reproduce all weights of at least this share of tokens; a mistake of more, as one
of many fits by chance.
"""


class _Candidate(NamedTuple):
    mistakes: tuple[Mistake, ...]
    variant: GateVariant
    moe: MoEConfig


def _candidates(moe: MoEConfig, has_bias: bool, dtype: torch.dtype) -> Iterator[_Candidate]:
    """The correct router, then mistakes; `dtype` is that of the activations."""
    selecting, weighing = list(_selection_mistakes(moe, has_bias)), list(_weight_mistakes(moe))
    correct, narrow = _Candidate((), CORRECT, moe), (torch.bfloat16, torch.float16)
    yield correct
    yield from selecting
    for kind in narrow:
        yield from _rounded(correct, kind)
    yield from weighing
    # A router in the dtype of the activations may have a second mistake.
    for candidate in (*selecting, *weighing) if dtype in narrow else ():
        yield from _rounded(candidate, dtype)


def _selection_mistakes(moe: MoEConfig, has_bias: bool) -> Iterator[_Candidate]:
    """Mistakes in group-limited selection and in the bias."""
    if moe.n_group > 1 and moe.topk_method != "greedy":
        mask = Mistake("group_mask", "fills discarded groups with 0, not -inf")
        yield _Candidate((mask,), GateVariant(fill=0.0), moe)
        if moe.topk_method == "noaux_tc":
            rank = Mistake(
                "group_rank", "ranks groups by their best expert, not by the sum of their two best"
            )
            yield _Candidate((rank,), GateVariant(by_best=True), moe)
        if has_bias:
            unbiased = Mistake("group_rank", "ranks groups by their scores without the bias")
            yield _Candidate((unbiased,), GateVariant(bias_in_groups=False), moe)
    if has_bias:
        weights = Mistake("bias_in_weights", "takes the routing weights from the biased scores")
        yield _Candidate((weights,), GateVariant(bias_in_weights=True), moe)
        choice = Mistake("bias_not_in_choice", "selects experts without the bias")
        yield _Candidate((choice,), GateVariant(bias_in_choice=False), moe)


def _rounded(candidate: _Candidate, kind: torch.dtype) -> Iterator[_Candidate]:
    """`candidate` as a router that computes in the data type `kind`."""
    mistake = Mistake("gate_precision", f"computes the router in {dtype_name(kind)}")
    for product, scores in ((kind, None), (kind, kind), (None, kind)):
        variant = replace(candidate.variant, product=product, scores=scores)
        yield _Candidate((mistake, *candidate.mistakes), variant, candidate.moe)


def _weight_mistakes(moe: MoEConfig) -> Iterator[_Candidate]:
    """Mistakes in the routing weights."""
    opposite = replace(moe, norm_topk_prob=not moe.norm_topk_prob)
    done = "normalises" if opposite.norm_topk_prob else "does not normalise"
    normal = Mistake("gate_normalisation", f"{done} the routing weights")
    yield _Candidate((normal,), CORRECT, opposite)
    if moe.routed_scaling_factor != 1.0:
        unscaled = replace(moe, routed_scaling_factor=1.0)
        scaling = Mistake("gate_scaling", "does not apply routed_scaling_factor")
        yield _Candidate((scaling,), CORRECT, unscaled)


def gate(trace: Trace, config: ModelConfig, block: Block) -> dict[str, StepAudit]:
    """Audits of the parts router_scores and routing_weights."""
    names = ("post_norm", "gate_weight", "chosen", "routing_weights")
    x, weight, chosen, seen = (trace.get(block, name) for name in names)
    moe = config.moe
    if x is None or weight is None or chosen is None or seen is None or moe is None:
        return {}
    if seen.shape[1] != moe.n_routed_experts or weight.shape != (seen.shape[1], x.shape[1]):
        return {}
    bias, chosen = trace.get(block, "gate_bias"), chosen.to(torch.int64)
    recorded = _RecordedGate(x, weight, bias, chosen, seen.gather(1, chosen), trace.dtype)
    share, mistakes = _best_candidate(recorded, moe)
    if share < (MISTAKEN if mistakes else REPRODUCED):
        return {"router_scores": StepAudit(), "routing_weights": UNEXPLAINED}
    rounded = tuple(found for found in mistakes if found.kind == "gate_precision")
    others = tuple(found for found in mistakes if found.kind != "gate_precision")
    return {
        "router_scores": StepAudit(mistakes=rounded),
        "routing_weights": StepAudit(mistakes=others),
    }


class _RecordedGate(NamedTuple):
    """Recorded input, weights and output of a router."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    chosen: Tensor
    factors: Tensor
    dtype: torch.dtype
    """Data type of the activations."""


def _best_candidate(gate: _RecordedGate, moe: MoEConfig) -> tuple[float, tuple[Mistake, ...]]:
    """The share of tokens that the best candidate reproduces, and its mistakes."""

    @cache
    def scores(variant: GateVariant) -> Tensor:
        return gate_scores(gate.x, gate.weight, moe, variant)

    best: tuple[float, tuple[Mistake, ...]] = (-1.0, ())
    for candidate in _candidates(moe, gate.bias is not None, gate.dtype):
        made = scores(
            replace(CORRECT, product=candidate.variant.product, scores=candidate.variant.scores)
        )
        same = _is_largest(ranking(made, gate.bias, candidate.moe, candidate.variant), gate.chosen)
        # A router in bf16 may also normalise in bf16, with one more rounding per step.
        close = ROUNDED if candidate.variant.scores is gate.dtype else CLOSE
        expected = selected_weights(gate.chosen, made, gate.bias, candidate.moe, candidate.variant)
        same &= _is_close(expected, gate.factors, close)
        share = float(same.double().mean())
        if share > best[0]:
            best = share, candidate.mistakes
        if share == 1.0:
            break
    return best


def _is_largest(ranked: Tensor, chosen: Tensor) -> Tensor:
    """For each token, whether the selected experts rank highest (ties count as equal)."""
    least = ranked.gather(1, chosen).amin(dim=1)
    others = ranked.scatter(1, chosen, float("-inf")).amax(dim=1)
    return least >= others - TIE


def _is_close(expected: Tensor, seen: Tensor, limit: float) -> Tensor:
    """For each token, whether its routing weights are reproduced."""
    rounded = seen.to(torch.bfloat16).to(seen.dtype)
    if torch.equal(rounded, seen):  # the weights were rounded to bf16
        expected = expected.to(torch.bfloat16).to(expected.dtype)
    close = (expected - seen).abs() <= limit * seen.abs().amax(dim=-1, keepdim=True)
    return close.all(dim=-1)
