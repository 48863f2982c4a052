"""Linear and RMSNorm as modules."""

import torch

from lowlat.model.linear import Embedding, Linear, RMSNorm
from lowlat.ops.norm import rms_norm


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


def test_norm_keeps_its_epsilon() -> None:
    norm = RMSNorm(5, 0.5, dtype=torch.float32).requires_grad_(False)
    norm.weight.normal_()
    x = torch.randn(3, 5)
    assert torch.equal(norm(x), rms_norm(x, norm.weight, 0.5))


def test_embedding_takes_rows() -> None:
    embedding = Embedding(5, 2, dtype=torch.float32).requires_grad_(False)
    embedding.weight.normal_()
    assert torch.equal(embedding(torch.tensor([4, 0, 4])), embedding.weight[[4, 0, 4]])
