"""Mistakes in attention: MLA and the other kinds, their masks, and the KV cache."""

from .mutant import Mutant

OPS, MODEL, ATTENTION = "tests/unit/ops/", "tests/unit/model/", "tests/unit/attention/"

ATTENTION_PATHS = [
    Mutant(
        "absorbed: W_UK rounded again",
        "ops/mla.py",
        'torch.einsum("qhn,hnc->qhc", q_nope, w_uk)',
        'torch.einsum("qhn,hnc->qhc", q_nope, w_uk.bfloat16().to(w_uk.dtype))',
        OPS + "test_mla.py::test_absorbed_equals_expanded",
    ),
    Mutant(
        "absorbed: W_UV rounded again",
        "ops/mla.py",
        'torch.einsum("qhc,hvc->qhv", mixed, w_uv)',
        'torch.einsum("qhc,hvc->qhv", mixed, w_uv.float().to(w_uv.dtype))',
        OPS + "test_mla.py::test_absorbed_equals_expanded",
    ),
    Mutant(
        "absorbed: up-projections quantised again",
        "model/mla.py",
        "self.kv_b_proj.dense_weight(dtype).unflatten",
        "self.kv_b_proj.dense_weight(dtype).to(torch.float8_e4m3fn).to(dtype).unflatten",
        MODEL + "test_mla.py::test_up_projections_are_views_of_the_stored_weight",
    ),
    Mutant(
        "MLA: value rows taken for key rows",
        "model/mla.py",
        "w_uk, w_uv = weight.split([dims.qk_nope_head_dim, dims.v_head_dim], dim=1)",
        "w_uv, w_uk = weight.split([dims.v_head_dim, dims.qk_nope_head_dim], dim=1)",
        MODEL + "test_mla.py::test_up_projections_are_nope_rows_then_value_rows_of_each_head",
    ),
    Mutant(
        "MLA: latent not normalised",
        "model/mla.py",
        "latent = self.kv_a_layernorm(latent)",
        "pass",
        MODEL + "test_mla.py::test_cache_entries_by_hand",
    ),
    Mutant(
        "attention: a query sees one later key",
        "ops/attention.py",
        "masked = key > query\n",
        "masked = key > query + 1\n",
        OPS + "test_attention.py::test_first_query_sees_only_itself",
    ),
    Mutant(
        "attention: window one key too wide",
        "ops/attention.py",
        "(key <= query - window)",
        "(key < query - window)",
        OPS + "test_attention.py::test_window_of_one_returns_the_own_value",
    ),
    Mutant(
        "attention: earlier blocks not rescaled",
        "ops/attention.py",
        "state[2] * keep + weighted",
        "state[2] + weighted",
        OPS + "test_mla.py::test_expansion_in_blocks",
    ),
    Mutant(
        "cache: pages read in order of their number",
        "attention/cache.py",
        "list(pages[:count])",
        "sorted(pages[:count])",
        ATTENTION + "test_cache.py::test_entries_are_read_in_sequence_order",
    ),
    Mutant(
        "cache: chunks attend as if they began the sequence",
        "attention/cached.py",
        "w_uk, w_uv, start=item.start, scale=scale",
        "w_uk, w_uv, start=0, scale=scale",
        ATTENTION + "test_cached.py::test_mla_in_chunks_equals_whole",
    ),
]

INT8_CACHE = [
    Mutant(
        "int8 cache: one scale for the whole row",
        "attention/int8_entry.py",
        "groups.abs().amax(dim=-1) / INT8_MAX",
        "groups.abs().amax(dim=(-1, -2), keepdim=True)[..., 0].expand(groups.shape[:2]) / INT8_MAX",
        ATTENTION + "test_int8_entry.py::test_each_64_channels_have_their_own_scale",
    ),
    Mutant(
        "int8 cache: the rotary key in int8 too",
        "config/attention.py",
        "rotated = self.qk_rope_head_dim if self.kv_a_layernorm else 0",
        "rotated = 0",
        ATTENTION + "test_cache.py::test_int8_bytes_per_token",
    ),
    Mutant(
        "int8 cache: halves rounded down",
        "attention/int8_entry.py",
        "(groups / divisor).round()",
        "(groups / divisor).trunc()",
        ATTENTION + "test_int8_entry.py::test_errors",
    ),
]

ATTENTION_VARIANTS = [
    Mutant(
        "GLA: every head reads the first group's latent",
        "model/gla.py",
        "(g * rank, width - (g + 1) * rank)",
        "(0, width - rank)",
        MODEL + "test_gla.py::test_every_head_reads_the_latent_of_its_group",
    ),
    Mutant(
        "GLA: one norm over all latents",
        "model/gla.py",
        "latents = [norm(c) for norm, c in zip(self.norms(), latents, strict=True)]",
        "latents = [self.norms()[0](c) for c in latents]",
        MODEL + "test_gla.py::test_every_head_reads_the_latent_of_its_group",
    ),
    Mutant(
        "MLRA: latents without their factor",
        "model/gla.py",
        "factor = (hidden / width) ** 0.5 if self.dims.sum_groups else 1.0",
        "factor = 1.0",
        MODEL + "test_gla.py::test_heads_of_mlra_sum_over_all_latents",
    ),
    Mutant(
        "MLRA: branches averaged",
        "model/gla.py",
        "* branches**-0.5",
        "/ branches",
        MODEL + "test_gla.py::test_heads_of_mlra_sum_over_all_latents",
    ),
    Mutant(
        "MLRA: a head's query in a branch is another head's",
        "model/gla.py",
        "part.repeat(1, branches, 1)",
        "part.repeat_interleave(branches, 1)",
        MODEL + "test_gla.py::test_heads_of_mlra_sum_over_all_latents",
    ),
    Mutant(
        "gated attention: the gate without sigmoid",
        "model/mla.py",
        "torch.sigmoid(self.g_proj(x))",
        "self.g_proj(x)",
        MODEL + "test_mla.py::test_the_gate_multiplies_the_heads_output",
    ),
    Mutant(
        "GTA: the value is the half that is no key",
        "ops/gta.py",
        "return torch.cat([tied[..., :nope], k_rope], dim=-1), tied",
        "return torch.cat([tied[..., -nope:], k_rope], dim=-1), tied",
        OPS + "test_gta.py::test_a_row_by_hand",
    ),
    Mutant(
        "TPA: products summed, not averaged",
        "ops/tpa.py",
        "return a.transpose(1, 2) @ b / a.shape[1]",
        "return a.transpose(1, 2) @ b",
        OPS + "test_tpa.py::test_the_mean_of_outer_products",
    ),
    Mutant(
        "TPA: channel factors of keys cached without rotation",
        "model/tpa.py",
        "b_k = apply_rope(b_k, rope, interleave=self.interleave).flatten(1)",
        "b_k = b_k.flatten(1)",
        MODEL + "test_tpa.py::test_naive",
    ),
    Mutant(
        "TPA: few queries see the tokens after them",
        "ops/tpa.py",
        "hidden = torch.arange(keys, device=q.device) > position[:, None]",
        "hidden = torch.arange(keys, device=q.device) > position.amax()[None, None]",
        OPS + "test_tpa.py::test_later_entries_are_masked",
    ),
]
