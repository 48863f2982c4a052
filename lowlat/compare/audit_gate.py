"""Audit of the gate: in what precision it scores experts, by which rule it chooses and weighs
them.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowlat.compare.gate import RIGHT, Rule, gate_scores, ranking, weighed
from lowlat.compare.outcome import UNEXPLAINED, Mistake, Outcome
from lowlat.compare.trace import Block, Trace
from lowlat.config.model import ModelConfig, MoEConfig

TIE, CLOSE, ROUNDED = 1e-6, 1e-5, 2.0**-6
"""Scores that may be ordered either way; factors that are one; the same, rounded to bf16."""
REPRODUCED = 0.5
"""Least share of tokens a gate's rule must reproduce to the last factor to be the one used."""


class _Way(NamedTuple):
    mistakes: tuple[Mistake, ...]
    rule: Rule
    moe: MoEConfig


def _ways(moe: MoEConfig, has_bias: bool, dtype: torch.dtype) -> Iterator[_Way]:
    """The right way to choose experts, then mistakes; `dtype` is the activations'."""
    choosing, weighing = list(_choosing(moe, has_bias)), list(_weighing(moe))
    yield _Way((), RIGHT, moe)
    yield from choosing
    yield from (way for kind in (torch.bfloat16, torch.float16) for way in _rounding(moe, kind))
    yield from weighing
    if dtype not in (torch.bfloat16, torch.float16):
        return
    # A gate in the type of the activations may have another mistake as well.
    for way in (*choosing, *weighing):
        for rounded in _rounding(way.moe, dtype):
            rule = replace(way.rule, product=rounded.rule.product, scores=rounded.rule.scores)
            yield _Way((*rounded.mistakes, *way.mistakes), rule, way.moe)


def _choosing(moe: MoEConfig, has_bias: bool) -> Iterator[_Way]:
    """Mistakes in groups and bias."""
    if moe.n_group > 1 and moe.topk_method != "greedy":
        mask = Mistake("group_mask", "fills discarded groups with 0, not -inf")
        yield _Way((mask,), Rule(fill=0.0), moe)
        if moe.topk_method == "noaux_tc":
            rank = Mistake("group_rank", "ranks groups by their best expert, not by their two best")
            yield _Way((rank,), Rule(by_best=True), moe)
    if has_bias:
        weights = Mistake("bias_in_weights", "takes the experts' factors from the biased scores")
        yield _Way((weights,), Rule(bias_in_weights=True), moe)
        choice = Mistake("bias_not_in_choice", "selects experts without the bias")
        yield _Way((choice,), Rule(bias_in_choice=False), moe)


def _rounding(moe: MoEConfig, kind: torch.dtype) -> Iterator[_Way]:
    """Gates that compute in `kind`."""
    name = "bf16" if kind is torch.bfloat16 else "fp16"
    for rule in (Rule(product=kind), Rule(product=kind, scores=kind), Rule(scores=kind)):
        yield _Way((Mistake("gate_precision", f"computes the gate in {name}"),), rule, moe)


def _weighing(moe: MoEConfig) -> Iterator[_Way]:
    """Mistakes in the factors."""
    opposite = replace(moe, norm_topk_prob=not moe.norm_topk_prob)
    done = "normalises" if opposite.norm_topk_prob else "does not normalise"
    normal = Mistake("gate_normalisation", f"{done} the experts' factors")
    yield _Way((normal,), RIGHT, opposite)
    if moe.routed_scaling_factor != 1.0:
        unscaled = replace(moe, routed_scaling_factor=1.0)
        scaling = Mistake("gate_scaling", "does not apply routed_scaling_factor")
        yield _Way((scaling,), RIGHT, unscaled)


def gate(trace: Trace, config: ModelConfig, block: Block) -> dict[str, Outcome]:
    """Outcomes of the scores (gate) and of what is made of them (router)."""
    names = ("post_norm", "gate_weight", "chosen", "router")
    x, weight, chosen, seen = (trace.get(block, name) for name in names)
    moe = config.moe
    if x is None or weight is None or chosen is None or seen is None or moe is None:
        return {}
    if seen.shape[1] != moe.n_routed_experts or weight.shape != (seen.shape[1], x.shape[1]):
        return {}
    bias, chosen = trace.get(block, "gate_bias"), chosen.to(torch.int64)
    seen_gate = _SeenGate(x, weight, bias, chosen, seen.gather(1, chosen), trace.dtype)
    share, mistakes = _best_way(seen_gate, moe)
    if share < REPRODUCED:
        return {"gate": Outcome(), "router": UNEXPLAINED}
    rounded = tuple(found for found in mistakes if found.kind == "gate_precision")
    others = tuple(found for found in mistakes if found.kind != "gate_precision")
    return {"gate": Outcome(mistakes=rounded), "router": Outcome(mistakes=others)}


class _SeenGate(NamedTuple):
    """A gate's input, weights and choice."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    chosen: Tensor
    factors: Tensor
    dtype: torch.dtype
    """Number type of the activations."""


def _best_way(gate: _SeenGate, moe: MoEConfig) -> tuple[float, tuple[Mistake, ...]]:
    """The share of tokens that the best way reproduces, and its mistakes (the right one first)."""

    @cache
    def scores(rule: Rule) -> Tensor:
        return gate_scores(gate.x, gate.weight, moe, rule)

    best: tuple[float, tuple[Mistake, ...]] = (-1.0, ())
    for way in _ways(moe, gate.bias is not None, gate.dtype):
        made = scores(replace(RIGHT, product=way.rule.product, scores=way.rule.scores))
        same = _is_largest(ranking(made, gate.bias, way.moe, way.rule), gate.chosen)
        # A gate in bf16 may normalise in bf16 too, each step rounding once more.
        close = ROUNDED if way.rule.scores is gate.dtype else CLOSE
        expected = weighed(gate.chosen, made, gate.bias, way.moe, way.rule)
        same &= _is_close(expected, gate.factors, close)
        share = float(same.double().mean())
        if share > best[0]:
            best = share, way.mistakes
        if share == 1.0:
            break
    return best


def _is_largest(ranked: Tensor, chosen: Tensor) -> Tensor:
    """For each token, whether no expert ranks above those chosen (ties may go either way)."""
    least = ranked.gather(1, chosen).amin(dim=1)
    others = ranked.scatter(1, chosen, float("-inf")).amax(dim=1)
    return least >= others - TIE


def _is_close(expected: Tensor, seen: Tensor, limit: float) -> Tensor:
    """For each token, whether its factors are reproduced."""
    rounded = seen.to(torch.bfloat16).to(seen.dtype)
    if torch.equal(rounded, seen):  # handed on in bf16
        expected = expected.to(torch.bfloat16).to(expected.dtype)
    close = (expected - seen).abs() <= limit * seen.abs().amax(dim=-1, keepdim=True)
    return close.all(dim=-1)
