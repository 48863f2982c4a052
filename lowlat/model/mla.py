"""Multi-head Latent Attention (MLA, DeepSeek-V3 section 2.1.1): the projections around the cached
latent. The attention paths (absorbed, expanded) are in `ops.mla`; sparse attention (DSA) adds the
indexer of `indexer`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.config.model import GLAConfig, MLAConfig, ModelConfig
from lowlat.model.indexer import Indexer
from lowlat.model.linear import Linear, RMSNorm
from lowlat.ops.rope import RotaryTable, apply_rope, scale_queries

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms on both latents: fixed in every released implementation, independent of
rms_norm_eps.
"""


def split_queries(
    q: Float[Tensor, "tokens heads_times_dim"],
    dims: MLAConfig | GLAConfig,
    rope: RotaryTable,
    *,
    interleave: bool,
) -> tuple[Float[Tensor, "tokens heads nope_dim"], Float[Tensor, "tokens heads rope_dim"]]:
    """q^C and the rotated q^R of every head (equations 6-9)."""
    q = scale_queries(q, rope).unflatten(-1, (dims.num_attention_heads, dims.qk_head_dim))
    q_nope, q_rope = q.split([dims.qk_nope_head_dim, dims.qk_rope_head_dim], dim=-1)
    return q_nope, apply_rope(q_rope, rope, interleave=interleave)


class MLA(nn.Module):
    """Equations 1 to 11: latent c_t and shared key k_R from h_t, queries per head, o_proj."""

    def __init__(
        self, config: ModelConfig, attention: MLAConfig, layer: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer = layer
        self.dims = attention
        self.scale = config.softmax_scale_of(layer)
        self.interleave = config.rope_of(layer).rope_interleave
        hidden, heads, bias = (
            config.hidden_size,
            attention.num_attention_heads,
            attention.attention_bias,
        )
        q_dim = heads * attention.qk_head_dim
        if attention.q_lora_rank is None:
            self.q_proj = Linear(hidden, q_dim, bias=attention.q_bias, dtype=dtype)
        else:
            self.q_a_proj = Linear(hidden, attention.q_lora_rank, bias=bias, dtype=dtype)
            self.q_a_layernorm = RMSNorm(attention.q_lora_rank, LATENT_NORM_EPS, dtype=dtype)
            self.q_b_proj = Linear(attention.q_lora_rank, q_dim, dtype=dtype)
        self.kv_a_proj_with_mqa = Linear(hidden, attention.kv_a_dim, bias=bias, dtype=dtype)
        if attention.kv_a_layernorm:
            self.kv_a_layernorm = RMSNorm(attention.kv_lora_rank, LATENT_NORM_EPS, dtype=dtype)
        kv_dim = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        self.kv_b_proj = Linear(attention.kv_lora_rank, kv_dim, dtype=dtype)
        self.o_proj = Linear(
            heads * attention.v_head_dim, hidden, bias=bias or attention.o_bias, dtype=dtype
        )
        if attention.attn_output_gate:
            self.g_proj = Linear(hidden, heads * attention.v_head_dim, dtype=dtype)
        self.indexer: Indexer | None = None
        if attention.indexer is not None and not attention.indexer.is_shared:
            rope = config.rope_of(layer)
            self.indexer = Indexer(config, attention, attention.indexer, rope, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        rope: RotaryTable,
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens hidden"]:
        q_latent = self.query_latent(x)
        q_nope, q_rope = self.head_queries(q_latent, rope)
        entries = self.entries(x, rope)
        if self.dims.indexer is None:
            out = self.attend(q_nope, q_rope, entries, attention)
        else:
            own = self.indexer
            index = None if own is None else own.queries(x, q_latent, rope)
            w_uk, w_uv = self.up_projections(q_nope.dtype)
            out = attention.sparse_mla(
                self.layer, q_nope, q_rope, entries, w_uk, w_uv, self.scale, index
            )
        return self.output(out.flatten(1), x)

    def attend(
        self,
        q_nope: Float[Tensor, "tokens heads nope_dim"],
        q_rope: Float[Tensor, "tokens heads rope_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        """Attention over the cached latents and `entries`, which the backend caches (equations 10
        and 11).
        """
        w_uk, w_uv = self.up_projections(q_nope.dtype)
        return attention.mla(self.layer, q_nope, q_rope, entries, w_uk, w_uv, self.scale)

    def output(
        self, out: Float[Tensor, "tokens width"], x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"]:
        """The output projection of the heads' outputs, multiplied by the gate if there is one."""
        if self.dims.attn_output_gate:
            out = out * torch.sigmoid(self.g_proj(x))
        return self.o_proj(out)

    def queries(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable
    ) -> tuple[Float[Tensor, "tokens heads nope_dim"], Float[Tensor, "tokens heads rope_dim"]]:
        """q^C and the rotated q^R of every head (equations 6-9)."""
        return self.head_queries(self.query_latent(x), rope)

    def query_latent(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens width"]:
        """The normalised c^Q of equation 6; `x` without a query latent."""
        if self.dims.q_lora_rank is None:
            return x
        return self.q_a_layernorm(self.q_a_proj(x))

    def head_queries(
        self, q_latent: Float[Tensor, "tokens width"], rope: RotaryTable
    ) -> tuple[Float[Tensor, "tokens heads nope_dim"], Float[Tensor, "tokens heads rope_dim"]]:
        """q^C and the rotated q^R of every head from `query_latent` (equations 7-9)."""
        project = self.q_proj if self.dims.q_lora_rank is None else self.q_b_proj
        return split_queries(project(q_latent), self.dims, rope, interleave=self.interleave)

    def entries(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable
    ) -> Float[Tensor, "tokens entry_dim"]:
        """KV cache entries: those of `latent_entries`, with an indexer [k_I ; c_t ; k_R]."""
        latent = self.latent_entries(x, rope)
        if self.indexer is None or self.dims.indexer is None:
            return latent
        return torch.cat([self.indexer.keys(x, rope), latent], dim=-1)

    def latent_entries(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable
    ) -> Float[Tensor, "tokens kv_a_dim"]:
        """The normalised latent and the rotated shared key, [c_t ; k_R] (equations 1 and 3)."""
        dims = self.dims
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [dims.kv_lora_rank, dims.qk_rope_head_dim], dim=-1
        )
        if dims.kv_a_layernorm:
            latent = self.kv_a_layernorm(latent)
        k_rope = apply_rope(k_rope[:, None], rope, interleave=self.interleave)[:, 0]
        return torch.cat([latent, k_rope], dim=-1)

    def up_projections(
        self, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "heads nope_dim latent"], Float[Tensor, "heads v_dim latent"]]:
        """W_UK and W_UV of every head (equations 2 and 5), views of kv_b_proj: nope rows, then
        value rows.
        """
        dims = self.dims
        weight = self.kv_b_proj.dense_weight(dtype).unflatten(0, (dims.num_attention_heads, -1))
        w_uk, w_uv = weight.split([dims.qk_nope_head_dim, dims.v_head_dim], dim=1)
        return w_uk, w_uv
