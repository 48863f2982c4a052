"""GQA's projections: biases, QK-norm before the rotation, and its ends MHA and MQA."""

from dataclasses import replace

import pytest
import torch

from lowlat.config.model import RopeConfig
from lowlat.model.gqa import GQA
from lowlat.ops.norm import rms_norm
from lowlat.ops.rope import RotaryEmbedding, apply_rope
from tests import configs
from tests.packed_attention import PackedAttention

from .draw import fill, gqa_config

ROPE = RopeConfig(rope_theta=1000.0)


def gqa(**changes: object) -> GQA:
    attention = replace(configs.GQA, **changes)
    module = GQA(gqa_config(attention=attention), attention, 0, dtype=torch.float64)
    fill(module)
    return module.requires_grad_(False)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_written_out(kv_heads: int, qk_norm: bool) -> None:
    """Query head h uses key head h // (6 / kv_heads); norm, then rotation; scale 10 ** -0.5."""
    module = gqa(num_key_value_heads=kv_heads, qk_norm=qk_norm, qkv_bias=True, o_bias=True)
    x, places = torch.randn(5, 23).double(), torch.arange(300, 305)
    rope = RotaryEmbedding(ROPE, 10)(places)
    q = (x @ module.q_proj.weight.T + module.q_proj.bias).view(5, 6, 10)
    k = (x @ module.k_proj.weight.T + module.k_proj.bias).view(5, kv_heads, 10)
    v = (x @ module.v_proj.weight.T + module.v_proj.bias).view(5, kv_heads, 10)
    if qk_norm:
        q = rms_norm(q, module.q_norm.weight, 1e-5)
        k = rms_norm(k, module.k_norm.weight, 1e-5)
    q = apply_rope(q, rope, interleave=False)
    k = apply_rope(k, rope, interleave=False)
    out = torch.empty(5, 6, 10).double()
    for token in range(5):
        for head in range(6):
            shared = head // (6 // kv_heads)
            scores = k[: token + 1, shared] @ q[token, head] * 10**-0.5
            out[token, head] = scores.softmax(0) @ v[: token + 1, shared]
    expected = out.flatten(1) @ module.o_proj.weight.T + module.o_proj.bias
    mine = module(x, rope, PackedAttention([5]))
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "biased"),
    [
        ({}, set()),
        ({"qkv_bias": True}, {"q_proj", "k_proj", "v_proj"}),
        ({"qkv_bias": True, "o_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_biases(changes: dict[str, object], biased: set[str]) -> None:
    names = {name for name, _ in gqa(**changes).named_parameters() if name.endswith(".bias")}
    assert names == {f"{name}.bias" for name in biased}
