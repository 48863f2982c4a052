"""Mistakes in rotary positions."""

from .mutant import Mutant

OPS, MODEL = "tests/unit/ops/", "tests/unit/model/"

YARN = [
    Mutant(
        "YaRN: softmax scale not corrected",
        "config/model.py",
        "return scale * yarn_mscale(rope.factor, rope.mscale_all_dim or 0.0) ** 2",
        "return scale",
        OPS + "test_rope.py::test_yarn_softmax_factor_of_released_models",
    ),
    Mutant(
        "YaRN: softmax correction not squared",
        "config/model.py",
        "rope.mscale_all_dim or 0.0) ** 2",
        "rope.mscale_all_dim or 0.0)",
        OPS + "test_rope.py::test_yarn_softmax_factor_of_released_models",
    ),
    Mutant(
        "YaRN: cos and sin not corrected",
        "ops/rope.py",
        "return RotaryTable(angles.cos() * magnitude, angles.sin() * magnitude)",
        "return RotaryTable(angles.cos(), angles.sin())",
        OPS + "test_rope.py::test_the_tables_carry_the_factor",
    ),
    Mutant(
        "YaRN: cos and sin factor without its denominator",
        "ops/rope.py",
        " / yarn_mscale(rope.factor, rope.mscale_all_dim)",
        "",
        OPS + "test_rope.py::test_yarn_cos_and_sin_factor",
    ),
    Mutant(
        "YaRN: fast pairs interpolated, slow ones kept",
        "ops/rope.py",
        "kept = 1 - ramp.clamp(0, 1)",
        "kept = ramp.clamp(0, 1)",
        OPS + "test_rope.py::test_yarn_ramp_of_deepseek_v3",
    ),
]

QUERIES = [
    Mutant(
        "mistral4: query scale grows with every position",
        "ops/rope.py",
        "torch.floor(positions / original)",
        "positions / original",
        OPS + "test_rope.py::test_query_scale_grows_in_steps",
    ),
    Mutant(
        "mistral4: queries not scaled",
        "model/mla.py",
        "q = scale_queries(q, rope).unflatten",
        "q = q.unflatten",
        MODEL + "test_rotary.py::test_queries_are_scaled_by_their_position",
    ),
    Mutant(
        "longrope: short factors for every context",
        "config/model.py",
        "factors = self.long_pair_factors if is_long else self.pair_factors",
        "factors = self.pair_factors",
        MODEL + "test_rotary.py::test_the_served_context_chooses_the_factors",
    ),
    Mutant(
        "minicpm3: scale_depth not divided by the depth",
        "config/model.py",
        "depth / math.sqrt(self.num_hidden_layers)",
        "depth",
        "tests/unit/config/test_hf_families.py::test_minicpm3_scales",
    ),
]

ROPE = [
    Mutant(
        "RoPE: half-split pairs on interleaved weights",
        "ops/rope.py",
        "real, imaginary = wide[..., 0::2], wide[..., 1::2]",
        "real, imaginary = wide.chunk(2, dim=-1)",
        OPS + "test_rope.py::test_interleaved_pairs_are_neighbours",
    ),
    Mutant(
        "RoPE: rotated pairs not put back in their places",
        "ops/rope.py",
        "torch.stack(rotated, dim=-1).flatten(-2) if interleave else torch.cat(rotated, dim=-1)",
        "torch.cat(rotated, dim=-1)",
        OPS + "test_rope.py::test_interleaved_pairs_are_neighbours",
    ),
    Mutant(
        "RoPE: cached key in the other layout than the queries",
        "model/mla.py",
        "k_rope = apply_rope(k_rope[:, None], rope, interleave=self.interleave)[:, 0]",
        "k_rope = apply_rope(k_rope[:, None], rope, interleave=not self.interleave)[:, 0]",
        MODEL + "test_mla.py::test_query_and_key_rotate_alike",
    ),
    Mutant(
        "RoPE: cached key not rotated",
        "model/mla.py",
        "        k_rope = apply_rope(k_rope[:, None], rope, interleave=self.interleave)[:, 0]\n",
        "",
        MODEL + "test_mla.py::test_query_and_key_rotate_alike",
    ),
    Mutant(
        "RoPE: positions in a narrow type",
        "ops/rope.py",
        "positions[:, None].to(torch.float32)",
        "positions[:, None].to(torch.bfloat16).to(torch.float32)",
        OPS + "test_rope.py::test_tables_are_fp32_at_far_positions",
    ),
]
