"""Grouped Latent Attention: MLA with a latent per group of heads (GLA, arXiv 2505.21487), and
Multi-Head Low-Rank Attention: every head attends in every group, and its outputs are summed (MLRA,
arXiv 2603.02188).

The KV cache entry [c_1 ; ... ; c_g ; k_R] has the width of MLA's, and attention over it is MLA's:
the up-projections of a head are zero for the latents of other groups. MLRA is GLA with a copy of
all heads, one query for all copies, in each group. Cache, engine and kernels do not distinguish
them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.config.attention import computed_heads
from lowlat.config.model import GLAConfig, ModelConfig
from lowlat.model.linear import Linear, RMSNorm
from lowlat.model.mla import LATENT_NORM_EPS, split_queries
from lowlat.ops.rope import RotaryTable, apply_rope


class GLA(nn.Module):
    """MLA with a norm per latent and a kv_b_proj that reads the latent of one group; MLRA has a
    kv_b_proj for each group, group by group.
    """

    def __init__(
        self, config: ModelConfig, attention: GLAConfig, layer: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer = layer
        self.dims = attention
        self.scale = config.softmax_scale_of(layer)
        self.interleave = config.rope_of(layer).rope_interleave
        hidden, heads = config.hidden_size, attention.num_attention_heads
        q_dim = heads * attention.qk_head_dim
        if attention.q_lora_rank is None:
            self.q_proj = Linear(hidden, q_dim, dtype=dtype)
        else:
            self.q_a_proj = Linear(hidden, attention.q_lora_rank, dtype=dtype)
            self.q_a_layernorm = self._norm(hidden, attention.q_lora_rank, dtype)
            self.q_b_proj = Linear(attention.q_lora_rank, q_dim, dtype=dtype)
        self.kv_a_proj_with_mqa = Linear(hidden, attention.entry_dim, dtype=dtype)
        self.kv_a_layernorm = nn.ModuleList(
            self._norm(hidden, attention.group_rank, dtype)
            for _ in range(attention.num_latent_groups)
        )
        kv_dim = computed_heads(attention) * (attention.qk_nope_head_dim + attention.v_head_dim)
        self.kv_b_proj = Linear(attention.group_rank, kv_dim, dtype=dtype)
        self.o_proj = Linear(heads * attention.v_head_dim, hidden, dtype=dtype)

    def _norm(self, hidden: int, width: int, dtype: torch.dtype) -> RMSNorm:
        """Norm of a latent; in MLRA its output has the scale of a product with `hidden` inputs."""
        factor = (hidden / width) ** 0.5 if self.dims.sum_groups else 1.0
        return RMSNorm(width, LATENT_NORM_EPS, dtype=dtype, factor=factor)

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        rope: RotaryTable,
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens hidden"]:
        q_nope, q_rope = self.queries(x, rope)
        w_uk, w_uv = self.up_projections(x.dtype)
        entries = self.entries(x, rope)
        branches = self.dims.branches
        q_nope, q_rope = (part.repeat(1, branches, 1) for part in (q_nope, q_rope))
        out = attention.mla(self.layer, q_nope, q_rope, entries, w_uk, w_uv, self.scale)
        out = out.unflatten(1, (branches, -1)).sum(dim=1) * branches**-0.5
        return self.o_proj(out.flatten(1))

    def queries(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable
    ) -> tuple[Float[Tensor, "tokens heads nope_dim"], Float[Tensor, "tokens heads rope_dim"]]:
        """NoPE and rotated RoPE components of every head."""
        dims = self.dims
        if dims.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return split_queries(q, dims, rope, interleave=self.interleave)

    def entries(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable
    ) -> Float[Tensor, "tokens entry_dim"]:
        """KV cache entries: the normalised latents and the rotated shared key."""
        dims = self.dims
        sizes = [dims.group_rank] * dims.num_latent_groups
        *latents, k_rope = self.kv_a_proj_with_mqa(x).split([*sizes, dims.rope_dim], dim=-1)
        latents = [norm(c) for norm, c in zip(self.norms(), latents, strict=True)]
        k_rope = apply_rope(k_rope[:, None], rope, interleave=self.interleave)[:, 0]
        return torch.cat([*latents, k_rope], dim=-1)

    def up_projections(
        self, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "heads nope_dim latent"], Float[Tensor, "heads v_dim latent"]]:
        """W_UK and W_UV of every head (MLRA: of its copy in every group) over all latents."""
        dims = self.dims
        weight = self.spread(self.kv_b_proj.dense_weight(dtype))
        weight = weight.unflatten(0, (computed_heads(dims), -1))
        w_uk, w_uv = weight.split([dims.qk_nope_head_dim, dims.v_head_dim], dim=1)
        return w_uk, w_uv

    def norms(self) -> list[RMSNorm]:
        """The norm of each group's latent."""
        return [norm for norm in self.kv_a_layernorm if isinstance(norm, RMSNorm)]

    def spread(self, weight: Shaped[Tensor, "rows group_rank"]) -> Shaped[Tensor, "rows latent"]:
        """Weights over a group's latent, padded with zeros to weights over all latents."""
        width, rank = self.dims.kv_lora_rank, self.dims.group_rank
        parts = weight.chunk(self.dims.num_latent_groups)
        return torch.cat(
            [F.pad(part, (g * rank, width - (g + 1) * rank)) for g, part in enumerate(parts)]
        )
