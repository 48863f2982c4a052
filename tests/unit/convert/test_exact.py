"""The exact MLA form: which models have it, its config, and the algebra of its weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig
from lowlat.convert.parameters.exact_mla import check_exact, mla_attention, mla_config
from lowlat.ops.rope import RotaryEmbedding, apply_rope
from lowlat.utils.errors import UserError
from tests.configs import model_config

HEADS, GROUPS, HEAD_DIM, HIDDEN = 15, 5, 22, 13


def gqa_model(**changes: object) -> ModelConfig:
    attention = GQAConfig(
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=HEAD_DIM, qkv_bias=True
    )
    model = model_config(
        "qwen2",
        attention,
        hidden_size=HIDDEN,
        max_position_embeddings=8192,
        rope=RopeConfig(rope_theta=1e5),
        tie_word_embeddings=True,
        eos_token_ids=(7,),
    )
    return replace(model, **changes)


def attention_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    heads, groups = HEADS * HEAD_DIM, GROUPS * HEAD_DIM
    tensors = {"o_proj.weight": random(HIDDEN, heads)}
    for name, rows in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
        tensors[f"{name}.weight"] = random(rows, HIDDEN)
        tensors[f"{name}.bias"] = random(rows)
    return tensors


def rotate(x: Tensor, rope: RopeConfig, positions: Tensor) -> Tensor:
    table = RotaryEmbedding(rope, x.shape[-1])(positions)
    return apply_rope(x, table, interleave=False)


def test_config_keeps_the_cache_row_and_everything_outside_attention() -> None:
    source = gqa_model()
    converted = mla_config(source)
    attention = converted.attention
    assert isinstance(attention, MLAConfig)
    assert attention.entry_dim == source.attention.entry_dim == 2 * GROUPS * HEAD_DIM
    assert (attention.qk_nope_head_dim, attention.v_head_dim) == (0, HEAD_DIM)
    assert not attention.kv_a_layernorm
    assert converted.model_type == "deepseek_v3"
    unchanged = replace(converted, attention=source.attention, rope=source.rope, model_type="qwen2")
    assert unchanged == source


def test_scores_and_outputs_are_those_of_the_groups() -> None:
    """Rotated q . k and the picked values agree with grouped attention at far positions, fp64."""
    source, converted = gqa_model(), mla_config(gqa_model())
    tensors = attention_tensors(torch.float64)
    wide = mla_attention(tensors, source.attention)
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    positions = torch.tensor([0, 1, 77, 4999, 8191, 100_000])
    q, k, v = (
        (x @ tensors[f"{n}.weight"].T + tensors[f"{n}.bias"]).view(6, -1, HEAD_DIM)
        for n in ("q_proj", "k_proj", "v_proj")
    )
    q, k = rotate(q, source.rope, positions), rotate(k, source.rope, positions)
    q_wide = x @ wide["q_proj.weight"].T + wide["q_proj.bias"]
    joint = x @ wide["kv_a_proj_with_mqa.weight"].T + wide["kv_a_proj_with_mqa.bias"]
    latent, k_wide = joint.chunk(2, dim=-1)
    q_wide = rotate(q_wide.view(6, HEADS, -1), converted.rope, positions)
    k_wide = rotate(k_wide[:, None], converted.rope, positions)[:, 0]
    group = torch.arange(HEADS) // (HEADS // GROUPS)
    scores = torch.einsum("qhd,khd->hqk", q, k[:, group])
    torch.testing.assert_close(
        torch.einsum("qhd,kd->hqk", q_wide, k_wide), scores, rtol=1e-12, atol=1e-12
    )
    values = (latent @ wide["kv_b_proj.weight"].T).view(6, HEADS, HEAD_DIM)
    torch.testing.assert_close(values, v[:, group], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_copies_in_their_own_dtype(dtype: torch.dtype) -> None:
    """Regression: any arithmetic on weights (a sqrt(G) in q), which would round in narrow types."""
    tensors = attention_tensors(dtype)
    wide = mla_attention(tensors, gqa_model().attention)
    assert {tensor.dtype for tensor in wide.values()} == {dtype}
    q = wide["q_proj.weight"]
    nonzero = q[q != 0].sort().values
    assert torch.equal(nonzero, tensors["q_proj.weight"].flatten().sort().values)
    joint = wide["kv_a_proj_with_mqa.weight"]
    assert torch.equal(joint[: GROUPS * HEAD_DIM], tensors["v_proj.weight"])
    keys = joint[GROUPS * HEAD_DIM :].flatten().sort().values
    assert torch.equal(keys, tensors["k_proj.weight"].flatten().sort().values)
    assert wide["o_proj.weight"] is tensors["o_proj.weight"]
    assert set(wide["kv_b_proj.weight"].unique().tolist()) == {0.0, 1.0}


def test_query_of_a_head_is_zero_outside_its_group() -> None:
    ones = {name: torch.ones_like(t) for name, t in attention_tensors(torch.float32).items()}
    q = mla_attention(ones, gqa_model().attention)["q_proj.bias"].view(
        HEADS, 2, GROUPS, HEAD_DIM // 2
    )
    for head in range(HEADS):
        expected = torch.zeros(2, GROUPS, HEAD_DIM // 2)
        expected[:, head // (HEADS // GROUPS)] = 1.0
        assert torch.equal(q[head], expected)


def test_output_bias_is_carried() -> None:
    tensors = attention_tensors(torch.float32) | {"o_proj.bias": torch.arange(13.0)}
    source = replace(gqa_model().attention, o_bias=True)
    assert torch.equal(mla_attention(tensors, source)["o_proj.bias"], torch.arange(13.0))


def test_mla_source_is_refused() -> None:
    with pytest.raises(UserError, match="already has Multi-head Latent Attention"):
        check_exact(mla_config(gqa_model()))


def test_qk_norm_is_refused_with_the_reason() -> None:
    attention = replace(gqa_model().attention, qk_norm=True)
    with pytest.raises(UserError, match="normalises every key head"):
        mla_config(gqa_model(model_type="qwen3", attention=attention))


def test_short_sliding_window_is_refused_and_a_long_one_dropped() -> None:
    with pytest.raises(UserError, match=r"sliding_window 4096 .* max_position_embeddings 8192"):
        mla_config(gqa_model(sliding_window=4096))
    assert mla_config(gqa_model(sliding_window=8192)).sliding_window is None
