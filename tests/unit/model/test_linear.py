"""Linear and RMSNorm as modules."""

import pytest
import torch
import torch.nn.functional as F

from lowlat.model.linear import Embedding, Linear, RMSNorm, has_native_kernel
from lowlat.ops.norm import rms_norm
from lowlat.ops.quantized import quantize_int4, quantize_int8


def test_linear_by_hand() -> None:
    linear = Linear(2, 3, bias=True, dtype=torch.float32).requires_grad_(False)
    linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert linear.bias is not None
    linear.bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
    assert linear(torch.tensor([[1.0, -1.0]])).tolist() == [[9.0, 19.0, 29.0]]


def test_activations_choose_the_type() -> None:
    """fp32 activations on bf16 weights multiply in fp32: the stored type is storage only."""
    linear = Linear(5, 3, bias=True, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.normal_()
    assert linear.bias is not None
    linear.bias.normal_()
    x = torch.randn(7, 5)
    expected = x @ linear.weight.float().T + linear.bias.float()
    torch.testing.assert_close(linear(x), expected)
    assert linear(x.double()).dtype == torch.float64


def test_a_plain_weight_is_not_copied() -> None:
    linear = Linear(5, 3, dtype=torch.float32)
    assert linear.dense_weight(torch.float32).data_ptr() == linear.weight.data_ptr()


def packed_linear(storage: str, weight: torch.Tensor) -> Linear:
    """A Linear with a bias whose weight is `weight`, packed."""
    linear = Linear(weight.shape[1], weight.shape[0], bias=True, dtype=torch.bfloat16)
    assert linear.bias is not None
    with torch.no_grad():
        linear.bias.normal_()
    linear.store_packed(storage)
    shapes = {name: (value.shape, value.dtype) for name, value in linear.state_dict().items()}
    parts = linear.pack(weight)
    for name, value in parts.items():
        assert shapes[name] == (value.shape, value.dtype), name
    assert set(shapes) == {*parts, "bias"}
    linear.load_state_dict(linear.state_dict() | parts, assign=True)
    return linear.requires_grad_(False)


@pytest.mark.parametrize("storage", ["int8", "int4", "int8_rows"])
def test_packed_shapes_and_values(storage: str) -> None:
    """Parameters have the shapes `pack` makes; sizes stay known."""
    weight = torch.randn(37, 77)
    linear = packed_linear(storage, weight)
    assert (linear.storage, linear.in_features, linear.out_features) == (storage, 77, 37)
    dense = linear.dense_weight(torch.float32)
    assert dense.shape == (37, 77)
    assert 0 < (dense - weight).abs().max() < {"int4": 0.5}.get(storage, 0.03)


@pytest.mark.parametrize("storage", ["int8", "int4", "int8_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_product(storage: str, dtype: torch.dtype) -> None:
    """The values, rounded to the activations' type, times the activations as they are."""
    linear, x = packed_linear(storage, torch.randn(37, 77)), torch.randn(5, 77).to(dtype)
    assert linear.bias is not None
    weight = linear.dense_weight(torch.float32).to(dtype)
    assert torch.equal(linear(x), F.linear(x, weight, linear.bias.to(dtype)))


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_packing_is_the_same_with_and_without_kernels(storage: str, dtype: torch.dtype) -> None:
    """Also of matrices the kernels do not take: other types, and columns that lie apart."""
    weight = torch.randn(77, 77).to(dtype)
    linear = Linear(77, 77, dtype=torch.bfloat16)
    linear.store_packed(storage)
    define = {"int4": quantize_int4, "int8": quantize_int8}[storage]
    assert not has_native_kernel(weight.T)
    for dense in (weight, weight.T):
        parts = linear.pack(dense)
        for name, expected in define(dense)._asdict().items():
            assert torch.equal(parts.pop(name), expected), name
        assert not parts


def test_packed_on_meta_stays_on_meta() -> None:
    with torch.device("meta"):
        linear = Linear(5, 3, dtype=torch.bfloat16)
    linear.store_packed("int4")
    assert all(parameter.is_meta for parameter in linear.parameters())
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_norm_keeps_its_epsilon() -> None:
    norm = RMSNorm(5, 0.5, dtype=torch.float32).requires_grad_(False)
    norm.weight.normal_()
    x = torch.randn(3, 5)
    assert torch.equal(norm(x), rms_norm(x, norm.weight, 0.5))


def test_embedding_takes_rows() -> None:
    embedding = Embedding(5, 2, dtype=torch.float32).requires_grad_(False)
    embedding.weight.normal_()
    assert torch.equal(embedding(torch.tensor([4, 0, 4])), embedding.weight[[4, 0, 4]])
