"""Expert selection and weights: hand-computed V2 and V3 rules and the cases public
implementations get wrong.
"""

import pytest
import torch
from torch import Tensor

from lowlat.config.model import MoEConfig
from lowlat.ops.routing import largest, route


def moe(**changes: object) -> MoEConfig:
    fields: dict = {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 0,
        "moe_intermediate_size": 3,
        "first_k_dense_replace": 0,
    }
    return MoEConfig(**(fields | changes))


def logits_as_input(logits: list[list[float]]) -> tuple[Tensor, Tensor]:
    """x and gate whose product is exactly `logits`."""
    x = torch.tensor(logits)
    return x, torch.eye(x.shape[1])


def logit(score: float) -> float:
    return torch.logit(torch.tensor(score, dtype=torch.float64)).item()


def test_v3_rule_by_hand() -> None:
    """Selection by biased scores, weights from unbiased ones: normalised, then scaled.

    Regression: the bias in the weights.
    """
    scores = [0.2, 0.5, 0.3, 0.6, 0.1, 0.4]
    x, gate = logits_as_input([[logit(s) for s in scores]])
    bias = torch.tensor([0.9, -0.6, 0.0, -0.1, 0.0, -0.3])
    # biased: 1.1, -0.1, 0.3, 0.5, 0.1, 0.1 -> experts 0 and 3 with scores 0.2 and 0.6
    routing = route(x, gate, bias, moe(routed_scaling_factor=2.5))
    assert routing.experts.tolist() == [[0, 3]]
    torch.testing.assert_close(routing.weights, torch.tensor([[2.5 * 0.25, 2.5 * 0.75]]))
    torch.testing.assert_close(routing.scores, torch.tensor([scores]))


def test_v3_without_normalisation_by_hand() -> None:
    x, gate = logits_as_input([[logit(s) for s in [0.2, 0.5, 0.3, 0.6, 0.1, 0.4]]])
    routing = route(x, gate, torch.zeros(6), moe(norm_topk_prob=False, routed_scaling_factor=3.0))
    assert routing.experts.tolist() == [[3, 1]]
    torch.testing.assert_close(routing.weights, torch.tensor([[1.8, 1.5]]))


V2 = {"scoring_func": "softmax", "topk_method": "greedy", "scale_after_norm": False}
V2_PROBABILITIES = [0.05, 0.3, 0.25, 0.2, 0.15, 0.05]


def v2_input() -> tuple[Tensor, Tensor]:
    return logits_as_input([torch.tensor(V2_PROBABILITIES).log().tolist()])


def test_v2_rule_by_hand() -> None:
    """Softmax over all experts, the chosen ones scaled and not normalised."""
    routing = route(*v2_input(), None, moe(**V2, norm_topk_prob=False, routed_scaling_factor=16.0))
    assert routing.experts.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weights, torch.tensor([[4.8, 4.0]]))


def test_v2_norm_rule_by_hand() -> None:
    """V2 either normalises or scales, never both; V3 does both."""
    routing = route(*v2_input(), None, moe(**V2, norm_topk_prob=True, routed_scaling_factor=16.0))
    torch.testing.assert_close(routing.weights, torch.tensor([[0.3 / 0.55, 0.25 / 0.55]]))


def test_a_single_expert_is_normalised_too() -> None:
    """Its weight is 1 before scaling, as in transformers."""
    x, gate = logits_as_input([[logit(s) for s in [0.2, 0.5, 0.3, 0.6, 0.1, 0.4]]])
    routing = route(x, gate, torch.zeros(6), moe(num_experts_per_tok=1, routed_scaling_factor=2.5))
    torch.testing.assert_close(routing.weights, torch.tensor([[2.5]]))


def test_v2_groups_are_ranked_by_their_best_expert() -> None:
    """Group maxima 0.3, 0.25, 0.15 against sums of two 0.35, 0.45, 0.2: V2 takes the first group,
    V3 the second.
    """
    groups = {"n_group": 3, "topk_group": 1}
    rule = V2 | groups | {"norm_topk_prob": False}
    by_best = route(*v2_input(), None, moe(**(rule | {"topk_method": "group_limited_greedy"})))
    assert by_best.experts.tolist() == [[1, 0]]
    by_sum = route(*v2_input(), torch.zeros(6), moe(**(rule | {"topk_method": "noaux_tc"})))
    assert by_sum.experts.tolist() == [[2, 3]]


def test_discarded_groups_lose_to_negative_scores() -> None:
    """All biased scores of the kept group are negative; a discarded group filled with 0 would win
    over them.

    Regression: discarded groups set to 0 instead of -inf.
    """
    x, gate = logits_as_input([[logit(s) for s in [0.5, 0.6, 0.7, 0.1, 0.2, 0.3]]])
    bias = torch.full((6,), -2.0)
    routing = route(x, gate, bias, moe(n_group=2, topk_group=1))
    assert routing.experts.tolist() == [[2, 1]]


def test_group_score_is_the_sum_of_the_two_best_biased() -> None:
    """The bias takes part in ranking groups too."""
    x, gate = logits_as_input([[logit(s) for s in [0.5, 0.5, 0.5, 0.4, 0.4, 0.4]]])
    bias = torch.tensor([0.0, 0.0, 0.0, 0.15, 0.1, -9.0])
    routing = route(x, gate, bias, moe(n_group=2, topk_group=1))
    assert routing.experts.tolist() == [[3, 4]]


def test_groups_of_one_expert() -> None:
    x, gate = logits_as_input([[0.1, 0.9, 0.5]])
    rule = moe(n_routed_experts=3, n_group=3, topk_group=2)
    assert route(x, gate, torch.zeros(3), rule).experts.tolist() == [[1, 2]]


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_ties_go_to_the_lowest_id(scoring_func: str) -> None:
    """Regression: torch.topk, which leaves the order of equal scores open."""
    x, gate = torch.ones(3, 5), torch.full((257, 5), 0.25)
    rule = moe(n_routed_experts=257, num_experts_per_tok=8, scoring_func=scoring_func)
    assert route(x, gate, torch.zeros(257), rule).experts.tolist() == [list(range(8))] * 3


def test_planted_ties_between_experts_and_groups() -> None:
    """Groups 1, 3 and 4 tie for two places, and within the kept ones experts tie."""
    scores = torch.full((5, 51), 0.25)
    scores[1, [7, 20]] = 0.5
    scores[3, [2, 50]] = 0.5
    scores[4, [0, 1]] = 0.5
    x, gate = torch.ones(1, 1), scores.flatten().logit()[:, None]
    rule = moe(n_routed_experts=255, num_experts_per_tok=6, n_group=5, topk_group=2)
    routing = route(x, gate, torch.zeros(255), rule)
    assert routing.experts.tolist() == [[51 + 7, 51 + 20, 153 + 2, 153 + 50, 51, 52]]


def test_largest_is_sorted_and_stable() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, -1.0, 3.0], [0.0, float("-inf"), 0.0, 2.0, 2.0]])
    assert largest(values, 4).tolist() == [[1, 2, 4, 0], [3, 4, 0, 2]]


def test_bias_counts_in_fp32() -> None:
    """Scores differ by 0.002 and so do the biases; in bf16 0.502 rounds to 0.5 and 0.251 to 0.25.

    Regression: the bias cast to bf16.
    """
    x, gate = logits_as_input([[logit(s) for s in [0.5, 0.502, 0.499]]])
    bias = torch.tensor([0.2510, 0.2491, 0.2510], dtype=torch.float32)
    rule = moe(n_routed_experts=3, num_experts_per_tok=1)
    assert route(x, gate, bias, rule).experts.tolist() == [[1]]
    assert route(x, gate, bias.bfloat16(), rule).experts.tolist() != [[1]]


def test_gate_multiplies_in_fp32() -> None:
    """Products of bf16 inputs need more than bf16: 1 + 1/256 and 1 + 1/512 both round to 1.

    Regression: the gate's matmul in bf16, and a product cast up too late.
    """
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    gate = torch.tensor([[1.0, 2**-9], [1.0, 2**-8], [1.0, 0.0]], dtype=torch.bfloat16)
    rule = moe(n_routed_experts=3, norm_topk_prob=False)
    routing = route(x, gate, torch.zeros(3), rule)
    assert routing.experts.tolist() == [[1, 0]]
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    expected = torch.tensor([[1 + 2**-9, 1 + 2**-8, 1.0]], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(routing.scores.double(), expected, rtol=0, atol=1e-7)


def test_scores_stay_exact_in_fp64() -> None:
    x, gate = torch.randn(5, 7).double(), torch.randn(6, 7).double()
    routing = route(x, gate, torch.zeros(6), moe())
    assert torch.equal(routing.scores, (x @ gate.T).sigmoid())


def test_gradient_reaches_the_gate_through_the_weights() -> None:
    x, gate = torch.randn(5, 7), torch.randn(6, 7, requires_grad=True)
    route(x, gate, torch.zeros(6), moe()).weights.square().sum().backward()
    assert gate.grad is not None and gate.grad.isfinite().all() and gate.grad.abs().sum() > 0
