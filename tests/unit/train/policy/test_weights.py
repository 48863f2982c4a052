"""The bf16 weights that engine and trainer share."""

import torch

from lowlat.train.layers.stacked_experts import unstacked
from lowlat.train.policy.weights import PolicyWeights
from tests.unit.train.policy.models import CONFIGS, masters


def test_an_update_is_rounded_into_the_same_tensors() -> None:
    trained = masters(CONFIGS["mla-moe-mtp"])
    weights = PolicyWeights(trained)
    model = weights.new_model()
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.ones_like(parameter))
    weights.refresh()
    expected = dict(unstacked(dict(trained.named_parameters())))
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.data_ptr() == addresses[name]
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert {t.dtype for t in state.values()} == {torch.bfloat16, torch.float32}


def test_gradients_reach_the_masters_and_values_are_rounded() -> None:
    trained = masters(CONFIGS["gqa"])
    weights = PolicyWeights(trained)
    prefix = "layers.0.self_attn."
    own = weights.differentiable(prefix, ("q_proj.",))["q_proj.weight"]
    master = trained.get_parameter(prefix + "q_proj.weight")
    assert torch.equal(own, master.bfloat16()) and own.dtype == torch.bfloat16
    (3 * own.float()).sum().backward()
    assert master.grad is not None and bool((master.grad == 3).all())
