"""Experts stacked for training and one by one in files: the same model both ways."""

from dataclasses import replace

import pytest
import torch

from lowlat.model.moe import Experts, MoE
from lowlat.model.transformer import Transformer
from lowlat.train.layers.stacked_experts import StackedExperts, stack_experts, unstacked
from tests.packed_attention import PackedAttention
from tests.unit.model.draw import mla_config, random_model


def model(dtype: torch.dtype = torch.float64) -> Transformer:
    return random_model(mla_config(num_nextn_predict_layers=1), dtype=dtype)


def test_a_stacked_model_computes_the_same() -> None:
    one = model()
    ids, backend = torch.arange(13) * 3, PackedAttention([7, 6])
    before = one(ids, backend.positions(), backend)
    kinds = [type(m.experts) for m in one.modules() if isinstance(m, MoE)]
    assert kinds == [Experts, Experts]
    stack_experts(one)
    kinds = [type(m.experts) for m in one.modules() if isinstance(m, MoE)]
    assert kinds == [StackedExperts, StackedExperts]
    after = one(ids, backend.positions(), backend)
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)
    again = [m.experts for m in one.modules() if isinstance(m, MoE)]
    stack_experts(one)
    assert [m.experts for m in one.modules() if isinstance(m, MoE)] == again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(dtype: torch.dtype) -> None:
    """Names, values and dtypes of every parameter; gate rows before up rows."""
    plain = model(dtype)
    names = {name: p.detach().clone() for name, p in plain.named_parameters()}
    stack_experts(plain)
    parameters = dict(plain.named_parameters())
    assert parameters["layers.1.mlp.experts.gate_up_proj"].shape == (10, 10, 23)
    assert parameters["layers.1.mlp.experts.down_proj"].shape == (10, 23, 5)
    found = dict(unstacked(parameters))
    assert found.keys() == names.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in names.items())
    assert {t.dtype for t in found.values()} == {dtype, torch.float32}
    again = Transformer(plain.config, dtype=dtype)
    again.load_state_dict(found)
    stack_experts(again)
    assert all(torch.equal(p, parameters[name]) for name, p in again.named_parameters())


def test_unstacked_tensors_are_views() -> None:
    """Export needs no second copy of the experts."""
    one = model()
    stack_experts(one)
    whole = one.layers[1].mlp.experts.gate_up_proj  # pyright: ignore[reportAttributeAccessIssue]
    parts = dict(unstacked({"layers.1.mlp.experts.gate_up_proj": whole}))
    storage = whole.untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() == storage for t in parts.values())
    assert len(parts) == 20


def test_models_without_experts_stay() -> None:
    dense = random_model(mla_config(moe=None))
    names = list(dict(dense.named_parameters()))
    stack_experts(dense)
    parameters = dict(dense.named_parameters())
    assert list(parameters) == names and dict(unstacked(parameters)).keys() == parameters.keys()


def test_on_the_meta_device() -> None:
    """As a model that is resumed is made: no memory until its tensors come."""
    config = mla_config()
    moe = config.moe
    assert moe is not None
    with torch.device("meta"):
        empty = Transformer(replace(config, moe=replace(moe, n_routed_experts=15)))
        stack_experts(empty)
    experts = empty.layers[1].mlp.experts  # pyright: ignore[reportAttributeAccessIssue]
    assert experts.down_proj.is_meta and experts.down_proj.shape == (15, 23, 5)
    assert experts.down_proj.requires_grad
