"""The indexer's projections by hand: normalised and rotated keys, queries, weights of the heads."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowlat.config.model import IndexerConfig, MLAConfig, RopeConfig
from lowlat.model.indexer import Indexer
from lowlat.ops.rope import RotaryEmbedding, RotaryTable, apply_rope
from tests import configs

from .draw import fill, mla_config

SIZES = IndexerConfig(index_n_heads=5, index_head_dim=9, index_topk=4)
ROPE = RopeConfig(rope_theta=100.0, rope_interleave=True)


def build(rope_interleave: bool = False, **changes: object) -> Indexer:
    sizes = replace(SIZES, rope_interleave=rope_interleave)
    attention: MLAConfig = replace(configs.MLA, indexer=sizes, **changes)
    config = mla_config(attention=attention, rope=ROPE)
    module = Indexer(config, attention, sizes, config.rope_of(0), dtype=torch.float64)
    fill(module)
    return module.requires_grad_(False)


def tables(*positions: int) -> RotaryTable:
    return RotaryEmbedding(ROPE, 6)(torch.tensor(positions))


def rotated(x: Tensor, table: RotaryTable, *, interleave: bool) -> Tensor:
    """The first six of nine channels."""
    turned = apply_rope(x[..., :6], table, interleave=interleave)
    return torch.cat([turned, x[..., 6:]], dim=-1)


@pytest.mark.parametrize("interleave", [False, True])
def test_keys_by_hand(interleave: bool) -> None:
    """LayerNorm with bias, then RoPE on the first channels, in the indexer's own layout: MLA's is
    interleaved in both cases.
    """
    module, x, table = build(interleave), torch.randn(3, 23).double(), tables(5, 70, 7001)
    plain = x @ module.wk.weight.T
    centred = plain - plain.mean(dim=-1, keepdim=True)
    normed = centred / (plain.var(dim=-1, correction=0, keepdim=True) + 1e-6).sqrt()
    normed = normed * module.k_norm.weight + module.k_norm.bias
    wanted = rotated(normed[:, None], table, interleave=interleave)[:, 0]
    torch.testing.assert_close(module.keys(x, table), wanted)
    other = rotated(normed[:, None], table, interleave=not interleave)[:, 0]
    assert (other - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("interleave", [False, True])
def test_queries_by_hand(interleave: bool) -> None:
    module, table = build(interleave), tables(5, 70, 7001)
    x, latent = torch.randn(3, 23).double(), torch.randn(3, 11).double()
    found = module.queries(x, latent, table)
    plain = (latent @ module.wq_b.weight.T).unflatten(-1, (5, 9))
    torch.testing.assert_close(found.q, rotated(plain, table, interleave=interleave))
    torch.testing.assert_close(found.weights, x @ module.weights_proj.weight.T / 5**0.5)
    assert found.topk == 4


def test_queries_and_keys_rotate_alike() -> None:
    """Scores of the rotated channels depend on the distance alone."""
    module = build()
    x, latent = torch.randn(1, 23).double(), torch.randn(1, 11).double()

    def score(query: int, key: int) -> Tensor:
        q = module.queries(x, latent, tables(query)).q[0]
        return q @ module.keys(x, tables(key))[0]

    torch.testing.assert_close(score(16, 5), score(11, 0), rtol=0, atol=1e-4)
    assert (score(11, 0) - score(0, 11)).abs().max() > 1e-3


def test_weights_are_fp32_in_a_narrow_model() -> None:
    module = build().to(torch.bfloat16)
    x, latent = torch.randn(3, 23).bfloat16(), torch.randn(3, 11).bfloat16()
    found = module.queries(x, latent, tables(1, 2, 3))
    assert found.q.dtype == torch.bfloat16 and found.weights.dtype == torch.float32
    wanted = x.double() @ module.weights_proj.weight.double().T / 5**0.5
    torch.testing.assert_close(found.weights.double(), wanted, rtol=0, atol=1e-5)


def test_without_query_latent_queries_come_from_the_layer_input() -> None:
    assert build(q_lora_rank=None).wq_b.in_features == 23
    assert build().wq_b.in_features == 11


def test_fewer_channels_rotate_at_some_frequencies() -> None:
    """Two channels at the first of three frequencies, in fp32, whose rotation trains natively."""
    sizes = replace(SIZES, index_rope_head_dim=2)
    attention = replace(configs.MLA, indexer=sizes)
    config = mla_config(attention=attention, rope=ROPE)
    module = Indexer(config, attention, sizes, config.rope_of(0), dtype=torch.float32)
    fill(module)
    x, table = torch.randn(2, 23), tables(5, 70)
    table = table._replace(cos=table.cos.float(), sin=table.sin.float())
    keys = module.keys(x, table)
    plain = module.k_norm(module.wk(x))
    cos, sin = table.cos[:, 0], table.sin[:, 0]
    first, second = plain[:, 0] * cos - plain[:, 1] * sin, plain[:, 0] * sin + plain[:, 1] * cos
    torch.testing.assert_close(keys, torch.cat([first[:, None], second[:, None], plain[:, 2:]], 1))
    keys.square().sum().backward()
    assert module.wk.weight.grad is not None
