"""Models whose layers differ in their attention, against the equations written out by hand."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowlat.attention.path import choose_path
from lowlat.config.attention import expansion_break_even, short_name
from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.model import MLAConfig, ModelConfig, RopeConfig
from lowlat.engine import scoring
from lowlat.engine.runner import ModelRunner
from tests.lowlat_configs import (
    DIFFERING,
    LAYER_ROPES,
    LAYERS,
    MLA,
    chosen_frequencies,
    lowlat_config,
)
from tests.lowlat_configs import random_model as model_of
from tests.packed_attention import PackedAttention

CONFIG = lowlat_config(
    DIFFERING,
    rope=(*LAYER_ROPES[:3], chosen_frequencies(*(0.5 + i for i in range(17)))),
    num_hidden_layers=4,
    num_nextn_predict_layers=1,
)
TOKENS = 37
IDS = torch.randint(0, 263, (TOKENS,), generator=torch.Generator().manual_seed(3))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, position: int, rope: RopeConfig) -> Tensor:
    """Every pair of one head's rotary channels as a complex number, times exp(i angle)."""
    pairs = len(x) // 2
    factors = torch.tensor(rope.pair_factors or [1.0] * pairs, dtype=torch.float64)
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    angle = position / (factors * rope.rope_theta**exponents)
    places = torch.arange(2 * pairs)
    first, second = places.view(-1, 2).T if rope.rope_interleave else places.view(2, -1)
    z = torch.complex(x[first], x[second]) * torch.polar(torch.ones_like(angle), angle)
    out = torch.empty_like(x)
    out[first], out[second] = z.real, z.imag
    return out


def attended(x: Tensor, w: Mapping[str, Tensor], a: MLAConfig, rope: RopeConfig) -> Tensor:
    """Equations 1-11, head by head and query by query."""

    def linear(name: str, rows: Tensor) -> Tensor:
        return rows @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    if a.q_lora_rank is None:
        q = linear("q_proj", x)
    else:
        q = linear("q_b_proj", norm(linear("q_a_proj", x), w["q_a_layernorm.weight"], 1e-6))
    down = linear("kv_a_proj_with_mqa", x)
    c, k_rope = down[:, : a.kv_lora_rank], down[:, a.kv_lora_rank :]
    if a.kv_a_layernorm:
        c = norm(c, w["kv_a_layernorm.weight"], 1e-6)
    k_rope = torch.stack([turned(k, t, rope) for t, k in enumerate(k_rope)])
    nope, width = a.qk_nope_head_dim, a.qk_nope_head_dim + a.qk_rope_head_dim
    heads = []
    for h in range(a.num_attention_heads):
        up = w["kv_b_proj.weight"].view(a.num_attention_heads, -1, a.kv_lora_rank)[h]
        k, v = torch.cat([c @ up[:nope].T, k_rope], dim=1), c @ up[nope:].T
        own = q[:, h * width : (h + 1) * width]
        rows = []
        for t in range(len(x)):
            query = torch.cat([own[t, :nope], turned(own[t, nope:], t, rope)])
            rows.append((k[: t + 1] @ query / width**0.5).softmax(dim=0) @ v[: t + 1])
        heads.append(torch.stack(rows))
    return linear("o_proj", torch.cat(heads, dim=1))


def block(x: Tensor, w: Mapping[str, Tensor], a: MLAConfig, rope: RopeConfig) -> Tensor:
    own = {name.removeprefix("self_attn."): t for name, t in w.items()}
    x = x + attended(norm(x, w["input_layernorm.weight"], 1e-5), own, a, rope)
    y = norm(x, w["post_attention_layernorm.weight"], 1e-5)
    inner = torch.nn.functional.silu(y @ w["mlp.gate_proj.weight"].T)
    return x + (inner * (y @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def hidden_by_hand(weights: Mapping[str, Tensor]) -> Tensor:
    x = weights["embed_tokens.weight"][IDS]
    for layer, (a, rope) in enumerate(zip(DIFFERING, CONFIG.rope, strict=True)):
        x = block(x, below(weights, f"layers.{layer}."), a, rope)
    return norm(x, weights["norm.weight"], 1e-5)


@pytest.mark.parametrize("chunk", [1, 5, TOKENS])
def test_logits_are_those_of_the_equations(chunk: int) -> None:
    """A token at a time (absorbed), a few, and all at once (expanded). Angles are fp32 in the
    model; everything else agrees to fp64."""
    model = model_of(CONFIG, torch.float64)
    weights = dict(model.named_parameters())
    expected = hidden_by_hand(weights) @ weights["lm_head.weight"].T
    found = scoring.logits(ModelRunner(model, page_size=8), IDS.tolist(), chunk=chunk)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_mtp_modules_are_as_the_last_layer() -> None:
    model = model_of(CONFIG, torch.float64)
    weights = dict(model.named_parameters())
    hidden, own = hidden_by_hand(weights), below(weights, "mtp.0.")
    ahead = IDS.roll(-1)
    embedded = weights["embed_tokens.weight"][ahead]
    joined = torch.cat(
        [norm(embedded, own["enorm.weight"], 1e-5), norm(hidden, own["hnorm.weight"], 1e-5)], dim=1
    )
    x = joined @ own["eh_proj.weight"].T
    x = block(x, below(own, "block."), DIFFERING[-1], CONFIG.rope_of(3))
    expected = norm(x, own["norm.weight"], 1e-5)
    packed = PackedAttention([TOKENS])
    positions = packed.positions()
    found = model.mtp_hidden(0, model(IDS, positions, packed), ahead, positions, packed)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_equal_layers_are_no_layers_that_differ() -> None:
    """The per-layer form of a uniform model is that model: the same config, so the same bits."""
    base = lowlat_config(MLA)
    tuples = replace(base, attention=(MLA, MLA), rope=(base.rope, base.rope))
    assert tuples == base and tuples.attention == MLA and hash(tuples) == hash(base)
    first, second = (model_of(config, torch.float32) for config in (base, tuples))
    found = [
        scoring.logits(ModelRunner(m, page_size=8), [3, 5, 7], chunk=2) for m in (first, second)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": (MLA,) * 3}, "attention has 3 layers, not 2"),
        ({"rope": (LAYER_ROPES[0],)}, "rope has 1 layers, not 2"),
        ({"attention": (MLA, replace(MLA, num_attention_heads=7))}, "number of heads"),
        ({"num_hidden_layers": 3, "rope": LAYER_ROPES[:2]}, "rope has 2 layers, not 3"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowlat_config(**({"attention": MLA} | changes))


def test_every_layer_uses_its_own_config() -> None:
    config = LAYERS["all"]
    assert [config.attention_of(layer) for layer in range(5)] == [*DIFFERING, DIFFERING[3]]
    assert [config.rope_of(layer) for layer in range(5)] == [*LAYER_ROPES, LAYER_ROPES[3]]
    scales = [config.softmax_scale_of(layer) for layer in range(5)]
    assert scales[:3] == [13**-0.5, 10**-0.5, 9**-0.5]
    assert scales[3] == scales[4] > 63**-0.5  # YaRN's correction
    assert config.num_attention_heads == 5
    assert short_name(config.attention) == "MLA 3-101 + 2-34"
    assert short_name(LAYERS["rope"].attention) == "MLA 13 + 6"


def sizes(latent: int) -> MLAConfig:
    return replace(
        MLA, kv_lora_rank=latent, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    )


def test_the_path_is_the_cheaper_one_of_all_layers_together() -> None:
    """Narrow latents never expand, wide ones beyond 89.6 queries, both together beyond 132.3."""
    narrow, wide = sizes(24), sizes(224)
    assert choose_path(narrow, 4000) == "absorbed"
    assert [choose_path(wide, length) for length in (89, 90)] == ["absorbed", "expanded"]
    both = expansion_break_even([narrow, wide])
    assert both == pytest.approx((24 * 128 + 224 * 128) / (320 - 80))
    assert [choose_path((narrow, wide), n) for n in (132, 133)] == ["absorbed", "expanded"]
    assert choose_path((narrow, wide), 32) == "decode"


def test_the_cache_is_the_sum_of_the_layers() -> None:
    """Not the widest row times the layers."""
    cost = kv_cache_size(CONFIG)
    rows = [11 + 6, 101 + 10, 3 + 2, 67 + 34]
    assert cost.own_bytes_per_token("bf16") == 2 * sum(rows)
    assert cost.elements_per_token_layer == sum(rows) / 4
    # the first has no norm on its latent, as a converted model: all of its row is int8
    packed = [20 + 4, 104 + 8 + 20, 4 + 4 + 4, 68 + 8 + 68]
    assert cost.own_bytes_per_token("int8") == sum(packed)


def counted(config: ModelConfig) -> int:
    return sum(rows.nbytes for rows in ModelRunner(model_of(config, torch.bfloat16)).cache.layers)


def test_the_cache_takes_that_memory() -> None:
    """16 pages of 64 tokens; the MTP module's rows are those of the last layer."""
    assert counted(CONFIG) == 2 * 16 * 64 * (17 + 111 + 5 + 101 + 101)
