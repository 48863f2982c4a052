"""One decoder layer, written out."""

import torch

from lowlat.model.block import DecoderLayer
from lowlat.ops.norm import rms_norm
from lowlat.ops.rope import RotaryEmbedding
from tests.packed_attention import PackedAttention

from .draw import fill, gqa_config, mla_config


def test_norm_before_each_half_and_a_residual_around_it() -> None:
    for config, layer in [(mla_config(), 0), (mla_config(), 1), (gqa_config(), 0)]:
        module = DecoderLayer(config, layer, dtype=torch.float64).requires_grad_(False)
        fill(module)
        backend = PackedAttention([5])
        rope = RotaryEmbedding(config.rope, config.attention.rope_dim)(backend.positions())
        x = torch.randn(5, 23).double()
        middle = x + module.self_attn(
            rms_norm(x, module.input_layernorm.weight, 1e-5), rope, backend
        )
        inner = rms_norm(middle, module.post_attention_layernorm.weight, 1e-5)
        expected = middle + module.mlp(inner)
        torch.testing.assert_close(module(x, rope, backend), expected, rtol=0, atol=1e-12)
