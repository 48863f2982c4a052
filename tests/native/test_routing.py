"""Native expert routing (group-limited top-k) against lowlat.ops.routing, at every level."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowlat.config.model import MoEConfig
from lowlat.ops import routing
from tests.configs import PLAIN_MOE

from . import kernels
from .inputs import (
    UNIT,
    assert_rows_stand_alone,
    assert_within,
    draw,
    every_level,
    needs_native,
    seeds,
)

pytestmark = needs_native


@st.composite
def moe_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Groups of one to five experts; as many of them chosen as the kept groups have.

    Fields, not a config: the type checks of its constructor draw random numbers, which a strategy
    must not.
    """
    groups, size = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    kept = draw(st.integers(1, groups))
    method = draw(st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"]))
    most = groups * size if method == "greedy" else kept * size
    return {
        "n_routed_experts": groups * size,
        "num_experts_per_tok": draw(st.integers(1, most)),
        "n_shared_experts": 0,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 0,
        "scoring_func": draw(st.sampled_from(["softmax", "sigmoid"])),
        "topk_method": method,
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "scale_after_norm": draw(st.booleans()),
    }


def choice_of(scores: Tensor, bias: Tensor | None, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Experts and weights by the definition, from given scores."""
    choice = scores if bias is None else scores + bias
    if moe.topk_method != "greedy" and moe.n_group > 1:
        choice = routing._keep_best_groups(choice, moe)
    experts = routing.largest(choice, moe.num_experts_per_tok)
    return experts, routing._weights(scores.gather(1, experts), moe)


@every_level
@settings(max_examples=150, deadline=None)
@given(
    fields=moe_fields(),
    tokens=st.integers(0, 6),
    hidden=st.integers(1, 70),
    seed=seeds,
    biased=st.booleans(),
)
def test_route(
    level: str, fields: dict[str, Any], tokens: int, hidden: int, seed: int, biased: bool
) -> None:
    """Scores are near the exact ones; the choice among them is the definition's, ties included."""
    moe = MoEConfig(**fields)
    x = draw((tokens, hidden), "normal", seed)
    gate = draw((moe.n_routed_experts, hidden), "normal", seed + 1)
    gate[1::3] = gate[: len(gate[1::3])]  # equal scores
    bias = 0.1 * torch.randn(len(gate)) if biased else None
    result = kernels.route(x, gate, bias, moe, level=level)
    exact = routing.route(x.double(), gate.double(), None, moe).scores
    logit_error = (hidden + 8) * UNIT * (x.double().abs() @ gate.double().abs().T)
    relative = 2 * logit_error.amax(dim=1, keepdim=True) + 64 * UNIT if tokens else logit_error
    assert_within(result.scores, exact, relative * exact + 1e-37)
    experts, weights = choice_of(result.scores, bias, moe)
    assert torch.equal(result.experts, experts)
    torch.testing.assert_close(
        result.weights, weights, rtol=(moe.num_experts_per_tok + 4) * UNIT, atol=0
    )


@every_level
def test_a_bias_chooses_but_does_not_weigh(level: str) -> None:
    moe = replace(PLAIN_MOE, n_routed_experts=4, num_experts_per_tok=1, norm_topk_prob=False)
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    gate = torch.tensor([[1.0], [0.0], [-1.0], [2.0]]).bfloat16()
    result = kernels.route(x, gate, torch.tensor([0.0, 5.0, -5.0, 0.0]), moe, level=level)
    assert result.experts.tolist() == [[1]]
    assert result.weights.tolist() == [[0.5]]


@every_level
def test_rows_stand_alone(level: str) -> None:
    moe = replace(PLAIN_MOE, n_routed_experts=24, num_experts_per_tok=5, n_group=4, topk_group=2)
    gate, bias = draw((24, 45), "normal", 1), torch.randn(24)

    def weights(x: Tensor) -> Tensor:
        result = kernels.route(x, gate, bias, moe, level=level)
        return torch.cat([result.experts.float(), result.weights, result.scores], dim=1)

    assert_rows_stand_alone(weights, draw((20, 45), "normal", 2))
