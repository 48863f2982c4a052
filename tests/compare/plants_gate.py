"""Mistakes in lowlat's gate and in the input of its MTP modules."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlat.config.model import MoEConfig
from lowlat.model import moe, mtp
from lowlat.model.transformer import Transformer
from lowlat.ops import routing
from lowlat.ops.routing import Routing

from .plant import UNNORMALISED, Plant, replace_function

KEEP_BEST_GROUPS = routing._keep_best_groups
FORWARD = Transformer.forward
MTP_HIDDEN = Transformer.mtp_hidden
MTP_FORWARD = mtp.MTPModule.forward


def zeros_for_discarded(choice: Tensor, settings: MoEConfig) -> Tensor:
    kept = KEEP_BEST_GROUPS(choice, settings)
    return kept.masked_fill(kept == -math.inf, 0.0)


def groups_by_their_best(choice: Tensor, settings: MoEConfig) -> Tensor:
    return KEEP_BEST_GROUPS(choice, replace(settings, topk_method="group_limited_greedy"))


def biased_weights(x: Tensor, gate: Tensor, bias: Tensor | None, settings: MoEConfig) -> Routing:
    found = routing.route(x, gate, bias, settings)
    assert bias is not None
    chosen = (found.scores + bias).gather(1, found.experts)
    weights = chosen / chosen.sum(dim=-1, keepdim=True) * settings.routed_scaling_factor
    return Routing(found.experts, weights, found.scores)


def unbiased_choice(x: Tensor, gate: Tensor, bias: Tensor | None, settings: MoEConfig) -> Routing:
    assert bias is not None
    return routing.route(x, gate, torch.zeros_like(bias), settings)


def unbiased_groups(x: Tensor, gate: Tensor, bias: Tensor, settings: MoEConfig) -> Routing:
    """Groups ranked by scores without the bias; experts in them with it."""
    found = routing.route(x, gate, bias, settings)
    kept = KEEP_BEST_GROUPS(found.scores, settings) > -math.inf
    choice = (found.scores + bias).masked_fill(~kept, -math.inf)
    experts = routing.largest(choice, settings.num_experts_per_tok)
    weights = routing._weights(found.scores.gather(1, experts), settings)
    return Routing(experts, weights, found.scores)


def by_other_settings(change: Callable[[MoEConfig], MoEConfig]) -> Callable[..., Routing]:
    """`route` as another config asks for."""
    return lambda x, gate, bias, settings: routing.route(x, gate, bias, change(settings))


def narrow_gate(
    *, product: torch.dtype | None = None, scores: torch.dtype | None = None
) -> Callable[..., Routing]:
    """`route` with its product or its scores rounded, cast up too late."""

    def route(x: Tensor, gate: Tensor, bias: Tensor, settings: MoEConfig) -> Routing:
        kind = product or x.dtype
        logits = (x.to(kind) @ gate.to(kind).T).to(x.dtype)
        made = logits.to(scores or x.dtype).sigmoid().to(x.dtype)
        choice = KEEP_BEST_GROUPS(made + bias, settings)
        experts = routing.largest(choice, settings.num_experts_per_tok)
        return Routing(experts, routing._weights(made.gather(1, experts), settings), made)

    return route


def hidden_first(self: Any, hidden: Tensor, embedded: Tensor, tables: Any, backend: Any) -> Tensor:
    joined = torch.cat([self.hnorm(hidden), self.enorm(embedded)], dim=-1)
    return self.norm(self.block(self.eh_proj(joined), tables, backend))


def first_zeroed(self: Any, hidden: Tensor, embedded: Tensor, *rest: Any) -> Tensor:
    later = torch.arange(len(embedded))[:, None] > 0
    return MTP_FORWARD(self, hidden, embedded * later, *rest)


def carries_raw(patch: pytest.MonkeyPatch) -> None:
    """The state in front of the final norm goes into the first MTP module."""
    state: dict[str, Tensor] = {}

    def forward(self: Transformer, *args: Any, **kwargs: Any) -> Tensor:
        hook = self.norm.register_forward_hook(
            lambda _, inputs, out: state.__setitem__("raw", inputs[0])
        )
        out = FORWARD(self, *args, **kwargs)
        hook.remove()
        return out

    def mtp_hidden(self: Transformer, depth: int, hidden: Tensor, *rest: Any) -> Tensor:
        given = state["raw"][: len(hidden)] if depth == 0 else hidden
        return MTP_HIDDEN(self, depth, given, *rest)

    patch.setattr(Transformer, "forward", forward)
    patch.setattr(Transformer, "mtp_hidden", mtp_hidden)


def routes(
    name: str,
    route: Callable[..., Routing],
    kind: str,
    says: str,
    *,
    first: str = "routing_weights",
    config: dict[str, Any] | None = None,
) -> Plant:
    return Plant(
        name=name,
        plant=replace_function(moe, "route", route),
        kind=kind,
        first=first,
        says=says,
        config=config or {},
    )


def rounded(name: str, **kinds: torch.dtype) -> Plant:
    kind = "bf16" if torch.bfloat16 in kinds.values() else "fp16"
    says = f"computes the router in {kind}"
    route = narrow_gate(**kinds)
    return routes(f"gate: {name} in {kind}", route, "gate_precision", says, first="router_scores")


def joins(name: str, forward: Callable[..., Tensor], kind: str, says: str) -> Plant:
    return Plant(
        name=f"MTP: {name}",
        plant=replace_function(mtp.MTPModule, "forward", forward),
        kind=kind,
        first="joined",
        says=says,
    )


GATE = [
    Plant(
        name="groups: discarded ones filled with 0",
        plant=replace_function(routing, "_keep_best_groups", zeros_for_discarded),
        kind="group_mask",
        first="routing_weights",
        says="fills discarded groups with 0, not -inf",
    ),
    Plant(
        name="groups: ranked by their best expert",
        plant=replace_function(routing, "_keep_best_groups", groups_by_their_best),
        kind="group_rank",
        first="routing_weights",
        says="ranks groups by their best expert, not by the sum of their two best",
    ),
    routes(
        "groups: ranked without the bias",
        unbiased_groups,
        "group_rank",
        "ranks groups by their scores without the bias",
    ),
    routes(
        "router bias: in the weights",
        biased_weights,
        "bias_in_weights",
        "takes the routing weights from the biased scores",
    ),
    routes(
        "router bias: not in the selection",
        unbiased_choice,
        "bias_not_in_choice",
        "selects experts without the bias",
    ),
    rounded("product", product=torch.bfloat16),
    rounded("product and scores", product=torch.bfloat16, scores=torch.bfloat16),
    rounded("product", product=torch.float16),
    rounded("scores", scores=torch.float16),
    routes(
        "factors: not normalised",
        by_other_settings(lambda settings: replace(settings, norm_topk_prob=False)),
        "gate_normalisation",
        "does not normalise the routing weights",
    ),
    routes(
        "factors: normalised against the config",
        by_other_settings(lambda settings: replace(settings, norm_topk_prob=True)),
        "gate_normalisation",
        "normalises the routing weights",
        config=UNNORMALISED,
    ),
    routes(
        "factors: not scaled",
        by_other_settings(lambda settings: replace(settings, routed_scaling_factor=1.0)),
        "gate_scaling",
        "does not apply routed_scaling_factor",
    ),
]
MTP = [
    joins("hidden state first", hidden_first, "mtp_order", "before the embedding, not after it"),
    Plant(
        name="MTP: hidden state in front of the final norm",
        plant=carries_raw,
        kind="mtp_hidden",
        first="joined",
        says="takes the hidden state before the final norm",
    ),
    joins(
        "first embedding zeroed",
        first_zeroed,
        "mtp_zeroed",
        "zeroes the embedding of the first position",
    ),
]
