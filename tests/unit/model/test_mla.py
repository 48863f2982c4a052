"""MLA's projections: what is cached, and which rows of kv_b_proj are which."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowlat.config.model import RopeConfig
from lowlat.model.linear import RMSNorm
from lowlat.model.mla import MLA
from lowlat.ops.norm import rms_norm
from lowlat.ops.rope import RotaryEmbedding, apply_rope
from tests import configs
from tests.packed_attention import PackedAttention

from .draw import YARN, fill, mla_config


def mla(rope: RopeConfig = YARN, **changes: object) -> MLA:
    attention = replace(configs.MLA, **changes)
    module = MLA(mla_config(attention=attention, rope=rope), attention, 0, dtype=torch.float64)
    fill(module)
    return module.requires_grad_(False)


def tables(positions: list[int], rope: RopeConfig = YARN) -> tuple[Tensor, Tensor]:
    return RotaryEmbedding(rope, 6)(torch.tensor(positions))


def test_up_projections_are_nope_rows_then_value_rows_of_each_head() -> None:
    module = mla()
    weight = module.kv_b_proj.weight
    w_uk, w_uv = module.up_projections(torch.float64)
    assert torch.equal(w_uk[1], weight[12:17])
    assert torch.equal(w_uv[1], weight[17:24])


def test_up_projections_are_views_of_the_stored_weight() -> None:
    """Regression: absorbed weights that are rounded or quantised again."""
    module = mla()
    w_uk, w_uv = module.up_projections(torch.float64)
    assert w_uk.data_ptr() == module.kv_b_proj.weight.data_ptr()
    assert w_uv._base is not None


@pytest.mark.parametrize("interleave", [True, False])
def test_cache_entries_by_hand(interleave: bool) -> None:
    """[norm(latent) ; rotated key]: the key is rotated as the queries are, in the checkpoint's
    layout.
    """
    rope = RopeConfig(rope_theta=100.0, rope_interleave=interleave)
    module = mla(rope)
    x = torch.randn(3, 23).double()
    rotation = tables([5, 70, 7001], rope)
    down = x @ module.kv_a_proj_with_mqa.weight.T
    latent = rms_norm(down[:, :13], module.kv_a_layernorm.weight, 1e-6)
    key = apply_rope(down[:, None, 13:], rotation, interleave=interleave)[:, 0]
    torch.testing.assert_close(module.entries(x, rotation), torch.cat([latent, key], dim=-1))
    other = apply_rope(down[:, None, 13:], rotation, interleave=not interleave)[:, 0]
    assert (other - key).abs().max() > 1e-2


@pytest.mark.parametrize("interleave", [True, False])
def test_query_and_key_rotate_alike(interleave: bool) -> None:
    """Scores of the rotary part depend on the distance only, so both sides use one layout and one
    table.
    """
    rope = RopeConfig(rope_theta=100.0, rope_interleave=interleave)
    module = mla(rope)
    x = torch.randn(1, 23).double()

    def score(query: int, key: int) -> Tensor:
        _, q_rope = module.queries(x, tables([query], rope))
        return q_rope[0] @ module.entries(x, tables([key], rope))[0, 13:]

    torch.testing.assert_close(score(16, 5), score(11, 0), rtol=0, atol=1e-4)
    assert (score(11, 0) - score(0, 11)).abs().max() > 1e-3


def test_norms_on_both_latents_have_a_fixed_epsilon() -> None:
    """Released implementations use 1e-6 there, independent of rms_norm_eps."""
    module = mla()
    for norm in (module.q_a_layernorm, module.kv_a_layernorm):
        assert isinstance(norm, RMSNorm) and norm.eps == 1e-6


def test_converted_models_cache_the_latent_as_it_is() -> None:
    module = mla(kv_a_layernorm=False)
    x = torch.randn(2, 23).double()
    latent = (x @ module.kv_a_proj_with_mqa.weight.T)[:, :13]
    torch.testing.assert_close(module.entries(x, tables([0, 1]))[:, :13], latent)


@pytest.mark.parametrize(
    ("changes", "biased"),
    [
        ({}, set()),
        ({"attention_bias": True}, {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"}),
        ({"attention_bias": True, "q_lora_rank": None}, {"kv_a_proj_with_mqa", "o_proj"}),
        ({"q_lora_rank": None, "q_bias": True, "o_bias": True}, {"q_proj", "o_proj"}),
    ],
)
def test_biases(changes: dict[str, object], biased: set[str]) -> None:
    names = {name for name, _ in mla(**changes).named_parameters() if name.endswith(".bias")}
    assert names == {f"{name}.bias" for name in biased}


def test_the_gate_multiplies_the_heads_output() -> None:
    """Gated attention: sigmoid(W_g x), element by element, before o_proj."""
    gated, plain = mla(attn_output_gate=True), mla()
    weights = gated.state_dict()
    gate = weights.pop("g_proj.weight")
    plain.load_state_dict(weights)
    heads: list[Tensor] = []
    plain.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    x, packed = torch.randn(5, 23).double(), PackedAttention([5])
    plain(x, tables([0, 1, 2, 3, 4]), packed)
    expected = (heads[0] * torch.sigmoid(x @ gate.T)) @ gated.o_proj.weight.T
    out = gated(x, tables([0, 1, 2, 3, 4]), packed)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_nope_free_heads() -> None:
    """The exact form of a converted model has no channels without position."""
    module = mla(qk_nope_head_dim=0, q_lora_rank=None)
    out = module(torch.randn(4, 23).double(), tables([0, 1, 2, 3]), PackedAttention([4]))
    assert out.shape == (4, 23) and out.isfinite().all()
