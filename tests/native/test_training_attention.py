"""Causal attention of training, forward and backward: the native kernel against PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowlat.ops import native, native_training_kernels

from .test_training import LEVELS, close, draw

LENGTHS = [(130, 64, 1, 31, 257), (77,)]
HEADS = [(4, 4, 48, 32), (6, 2, 24, 40), (3, 1, 7, 5)]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    outputs = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads = (x.transpose(0, 1) for x in parts)
        out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=0.3, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "key_dim", "value_dim"), HEADS)
def test_native_causal_attention(
    level: str,
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
) -> None:
    count = sum(lengths)
    q = draw(count, heads, key_dim, dtype=torch.bfloat16)
    k = draw(count, kv_heads, key_dim, dtype=torch.bfloat16, seed=1)
    v = draw(count, kv_heads, value_dim, dtype=torch.bfloat16, seed=2)
    grad = draw(count, heads, value_dim, dtype=torch.bfloat16, seed=3)
    ends = torch.tensor(lengths).cumsum(0)
    out, logs = native_training_kernels.causal_forward(q, k, v, ends, 0.3)
    grads = native_training_kernels.causal_backward(q, k, v, ends, 0.3, out, logs, grad)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = plain_attention(*wide, lengths)
    wanted.backward(grad.double())
    close(out, wanted.detach(), torch.bfloat16)
    for found, leaf in zip(grads, wide, strict=True):
        assert leaf.grad is not None
        close(found, leaf.grad, torch.bfloat16)


@pytest.mark.skipif(not native.available(), reason="no native kernels")
@pytest.mark.parametrize("ends", [[3], [2, 2, 4], [4, 3], [0, 4], [5], []])
def test_native_causal_attention_refuses_ends_that_do_not_fit(ends: list[int]) -> None:
    x = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="ends"):
        native_training_kernels.causal_forward(x, x, x, torch.tensor(ends, dtype=torch.int64), 1.0)
