"""GLA: one group is MLA, and with several a head reads the latent of its group alone. MLRA: every
head attends in every group.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowlat.config.attention import computed_heads, expansion_break_even
from lowlat.config.model import GLAConfig, MLAConfig
from lowlat.engine import scoring
from lowlat.engine.runner import ModelRunner
from lowlat.model.gla import GLA as Module
from lowlat.model.transformer import Transformer
from lowlat.ops.norm import rms_norm
from lowlat.ops.rope import RotaryEmbedding, apply_rope
from tests.lowlat_configs import GLA, YARN, lowlat_config, random_model
from tests.packed_attention import PackedAttention


def as_mla(attention: GLAConfig) -> MLAConfig:
    return MLAConfig(
        num_attention_heads=attention.num_attention_heads,
        kv_lora_rank=attention.kv_lora_rank,
        q_lora_rank=attention.q_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_group_is_mla_bit_for_bit(dtype: torch.dtype) -> None:
    attention = replace(GLA, num_latent_groups=1)
    config = lowlat_config(attention, rope=YARN)
    gla = random_model(config, dtype)
    mla = Transformer(replace(config, attention=as_mla(attention)), dtype=dtype)
    named = {name.replace("layernorm.0.", "layernorm."): p for name, p in gla.state_dict().items()}
    mla.load_state_dict(named)
    ids = torch.randint(0, 263, (41,), generator=torch.Generator().manual_seed(1))
    packed = PackedAttention([41])
    logits = [model.logits(model(ids, packed.positions(), packed)) for model in (gla, mla)]
    assert torch.equal(*logits)
    # The native kernels, where they are and the model is bf16; every form of rows.
    for chunk in (1, 40):
        cached = [
            scoring.logits(ModelRunner(model), ids.tolist(), chunk=chunk) for model in (gla, mla)
        ]
        assert torch.equal(*cached)


def naive(module: Module, x: Tensor, rope: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Head by head, as the paper writes it."""
    dims, length = module.dims, len(x)
    rank, heads = dims.group_rank, dims.num_attention_heads
    down = x @ module.kv_a_proj_with_mqa.weight.T
    k_rope = apply_rope(down[:, None, dims.kv_lora_rank :], rope, interleave=True)[:, 0]
    q = rms_norm(x @ module.q_a_proj.weight.T, module.q_a_layernorm.weight, 1e-6)
    q = (q @ module.q_b_proj.weight.T).view(length, heads, -1)
    outputs = []
    for head in range(heads):
        group = head // (heads // dims.num_latent_groups)
        latent = down[:, group * rank : (group + 1) * rank]
        latent = rms_norm(latent, module.norms()[group].weight, 1e-6)
        up = module.kv_b_proj.weight.view(heads, -1, rank)[head]
        key = torch.cat([latent @ up[: dims.qk_nope_head_dim].T, k_rope], dim=1)
        q_nope, q_rope = q[:, head].split([dims.qk_nope_head_dim, dims.qk_rope_head_dim], dim=1)
        q_rope = apply_rope(q_rope[:, None], rope, interleave=True)[:, 0]
        scores = torch.cat([q_nope, q_rope], dim=1) @ key.T * scale
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=1)
        outputs.append(weights @ (latent @ up[dims.qk_nope_head_dim :].T))
    return torch.cat(outputs, dim=1) @ module.o_proj.weight.T


def assert_computes(
    attention: GLAConfig,
    expected: Callable[[Module, Tensor, tuple[Tensor, Tensor], float], Tensor],
) -> None:
    config = lowlat_config(attention, rope=YARN)
    module = random_model(config, torch.float64).layers[1].self_attn
    assert isinstance(module, Module)
    x = torch.randn(19, 23, dtype=torch.float64)
    packed = PackedAttention([19])
    rope = RotaryEmbedding(config.rope, attention.rope_dim)(packed.positions())
    out = expected(module, x, rope, config.softmax_scale_of(0))
    torch.testing.assert_close(module(x, rope, packed), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [2, 3])
def test_every_head_reads_the_latent_of_its_group(groups: int) -> None:
    assert_computes(replace(GLA, num_latent_groups=groups, kv_lora_rank=13 * groups), naive)


def naive_mlra(module: Module, x: Tensor, rope: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Branch by branch and head by head, as the paper writes it."""
    dims, length, hidden = module.dims, len(x), x.shape[1]
    rank, heads, nope = dims.group_rank, dims.num_attention_heads, dims.qk_nope_head_dim
    assert dims.q_lora_rank is not None
    down = x @ module.kv_a_proj_with_mqa.weight.T
    k_rope = apply_rope(down[:, None, dims.kv_lora_rank :], rope, interleave=True)[:, 0]
    q = rms_norm(x @ module.q_a_proj.weight.T, module.q_a_layernorm.weight, 1e-6)
    q = q * math.sqrt(hidden / dims.q_lora_rank)
    q = (q @ module.q_b_proj.weight.T).view(length, heads, -1)
    ups = module.kv_b_proj.weight.view(dims.num_latent_groups, heads, -1, rank)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    outputs = torch.zeros(length, heads, dims.v_head_dim, dtype=x.dtype)
    for branch in range(dims.num_latent_groups):
        latent = down[:, branch * rank : (branch + 1) * rank]
        latent = rms_norm(latent, module.norms()[branch].weight, 1e-6) * math.sqrt(hidden / rank)
        for head in range(heads):
            up = ups[branch, head]
            q_rope = apply_rope(q[:, head, None, nope:], rope, interleave=True)[:, 0]
            scores = q[:, head, :nope] @ (latent @ up[:nope].T).T + q_rope @ k_rope.T
            weights = (scores * scale).masked_fill(~seen, float("-inf")).softmax(dim=1)
            outputs[:, head] += weights @ (latent @ up[nope:].T)
    outputs /= math.sqrt(dims.num_latent_groups)
    return outputs.flatten(1) @ module.o_proj.weight.T


@pytest.mark.parametrize("groups", [2, 4])
def test_heads_of_mlra_sum_over_all_latents(groups: int) -> None:
    attention = replace(GLA, num_latent_groups=groups, kv_lora_rank=13 * groups, sum_groups=True)
    assert_computes(attention, naive_mlra)


def test_the_cache_is_mlas() -> None:
    assert GLA.entry_dim == as_mla(GLA).entry_dim == 32
    assert GLA.quantized_dim == 26
    mlra = replace(GLA, sum_groups=True)
    assert (mlra.entry_dim, computed_heads(mlra), computed_heads(GLA)) == (32, 12, 6)
    assert expansion_break_even([GLA]) == expansion_break_even([as_mla(GLA)])
