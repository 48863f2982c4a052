"""Mistakes in the choice of experts."""

from .mutant import Mutant

OPS, MODEL = "tests/unit/ops/", "tests/unit/model/"
LOAD = "tests/unit/checkpoint/test_load.py"

ROUTING = [
    Mutant(
        "groups: discarded ones filled with 0",
        "ops/routing.py",
        'groups.masked_fill(~kept[..., None], float("-inf"))',
        "groups.masked_fill(~kept[..., None], 0.0)",
        OPS + "test_routing.py::test_discarded_groups_lose_to_negative_scores",
    ),
    Mutant(
        "groups: ranked by their best expert in V3",
        "ops/routing.py",
        'best = min(2, groups.shape[-1]) if moe.topk_method == "noaux_tc" else 1',
        "best = 1",
        OPS + "test_routing.py::test_v2_groups_are_ranked_by_their_best_expert",
    ),
    Mutant(
        "groups: ranked without the bias",
        "ops/routing.py",
        "choice = _keep_best_groups(choice, moe)",
        'choice = choice.masked_fill(_keep_best_groups(scores, moe) == float("-inf"), '
        'float("-inf"))',
        OPS + "test_routing.py::test_group_score_is_the_sum_of_the_two_best_biased",
    ),
    Mutant(
        "router bias: in the weights",
        "ops/routing.py",
        "_weights(scores.gather(1, experts), moe)",
        "_weights(choice.gather(1, experts), moe)",
        OPS + "test_routing.py::test_v3_rule_by_hand",
    ),
    Mutant(
        "router bias: not in the selection",
        "ops/routing.py",
        "choice = scores if bias is None else scores + bias",
        "choice = scores",
        OPS + "test_routing.py::test_v3_rule_by_hand",
    ),
    Mutant(
        "router bias: added in bf16",
        "ops/routing.py",
        "scores + bias",
        "scores + bias.bfloat16()",
        OPS + "test_routing.py::test_bias_counts_in_fp32",
    ),
    Mutant(
        "router bias: stored in the model's type",
        "model/moe.py",
        "bias = torch.empty(moe.n_routed_experts, dtype=torch.float32)",
        "bias = torch.empty(moe.n_routed_experts, dtype=dtype)",
        MODEL + "test_moe.py::test_router_bias_is_fp32_in_every_model",
    ),
    Mutant(
        "router bias: cast while loading",
        "checkpoint/fill_parameters.py",
        "        return tensor.to(torch.float32)\n    if blocks",
        "        return tensor.to(dtype or torch.float32)\n    if blocks",
        LOAD + "::test_cast[bf16]",
    ),
    Mutant(
        "router bias: NaN accepted",
        "checkpoint/fill_parameters.py",
        "not bool(tensor.float().isfinite().all())",
        "False",
        LOAD + "::test_broken[router bias NaN]",
    ),
    Mutant(
        "gate: matmul in bf16",
        "ops/routing.py",
        "logits = x.to(wide) @ gate.to(wide).T",
        "logits = x @ gate.to(x.dtype).T",
        OPS + "test_routing.py::test_gate_multiplies_in_fp32",
    ),
    Mutant(
        "gate: product cast up too late",
        "ops/routing.py",
        "logits = x.to(wide) @ gate.to(wide).T",
        "logits = (x @ gate.to(x.dtype).T).to(wide)",
        OPS + "test_routing.py::test_gate_multiplies_in_fp32",
    ),
    Mutant(
        "gate: sigmoid in bf16",
        "ops/routing.py",
        "scores = logits.sigmoid()",
        "scores = logits.to(x.dtype).sigmoid().to(wide)",
        OPS + "test_routing.py::test_gate_multiplies_in_fp32",
    ),
    Mutant(
        "top-k: ties in no order",
        "ops/routing.py",
        "values.sort(dim=-1, descending=True, stable=True).indices[:, :count]",
        "values.topk(count, dim=-1).indices",
        OPS + "test_routing.py::test_ties_go_to_the_lowest_id",
    ),
    Mutant(
        "weights: scaled after normalising in V2",
        "ops/routing.py",
        "weights * moe.routed_scaling_factor if moe.scale_after_norm else weights",
        "weights * moe.routed_scaling_factor",
        OPS + "test_routing.py::test_v2_norm_rule_by_hand",
    ),
    Mutant(
        "weights: not scaled after normalising in V3",
        "ops/routing.py",
        "weights * moe.routed_scaling_factor if moe.scale_after_norm else weights",
        "weights",
        OPS + "test_routing.py::test_v3_rule_by_hand",
    ),
]
