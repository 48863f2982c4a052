"""The mixture as a module: shared experts, gate parameters, which layers have one."""

from dataclasses import replace

import pytest
import torch

from lowlat.config.model import MoEConfig
from lowlat.model.moe import MLP, Gate, MoE
from lowlat.ops.experts import swiglu
from lowlat.ops.routing import route

from .draw import MOE, fill, mla_config, random_model


def moe_of(**changes: object) -> tuple[MoE, MoEConfig]:
    rule = replace(MOE, **changes)
    module = MoE(mla_config(moe=rule), rule, dtype=torch.float64)
    fill(module)
    return module.requires_grad_(False), rule


def test_routed_plus_shared_written_out() -> None:
    module, rule = moe_of()
    x = torch.randn(13, 23).double()
    routing = route(x, module.gate.weight, module.gate.e_score_correction_bias, rule)
    assert module.shared_experts is not None
    expected = module.shared_experts(x)
    for token in range(13):
        for expert, weight in zip(routing.experts[token], routing.weights[token], strict=True):
            mlp = module.experts[int(expert)]
            assert isinstance(mlp, MLP)
            gate, up = mlp.gate_proj.weight @ x[token], mlp.up_proj.weight @ x[token]
            expected[token] += weight * (mlp.down_proj.weight @ swiglu(gate, up))
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_shared_experts_are_one_mlp_as_wide_as_all() -> None:
    module, _ = moe_of(n_shared_experts=2)
    assert isinstance(module.shared_experts, MLP)
    assert module.shared_experts.gate_proj.weight.shape == (10, 23)
    assert moe_of(n_shared_experts=0)[0].shared_experts is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_router_bias_is_fp32_in_every_model(dtype: torch.dtype) -> None:
    """Regression: a bias stored in the model's narrow type."""
    bias = Gate(23, moe_of()[1], dtype=dtype).e_score_correction_bias
    assert bias is not None and bias.dtype == torch.float32
    assert not bias.requires_grad


def test_a_bf16_model_uses_every_bit_of_its_bias() -> None:
    """Two experts tie but for 2^-12 of bias, which bf16 would round away."""
    rule = moe_of(n_group=1, topk_group=1, num_experts_per_tok=1)[1]
    gate = Gate(23, rule, dtype=torch.bfloat16).requires_grad_(False)
    gate.weight.zero_()
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias.fill_(1.0)
    gate.e_score_correction_bias[7] += 2.0**-12
    assert gate(torch.ones(1, 23, dtype=torch.bfloat16)).experts.tolist() == [[7]]


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_no_bias_without_noaux_tc(method: str) -> None:
    assert moe_of(topk_method=method)[0].gate.e_score_correction_bias is None


def test_which_layers_are_mixtures() -> None:
    rule = moe_of(first_k_dense_replace=2, moe_layer_freq=2)[1]
    model = random_model(mla_config(moe=rule, num_hidden_layers=6))
    kinds = [type(layer.mlp) for layer in model.layers]
    assert kinds == [MLP, MLP, MoE, MLP, MoE, MLP]
