"""KV cache entries of Grouped-Tied Attention, [s_1 ; ... ; s_g ; k_R] (arXiv 2505.21487).

The value of group j is s_j, the key [leading channels of s_j ; k_R]. This is latent attention over
the latent [s_1 ; ... ; s_g] with 0/1 up-projections, which is how the native kernels compute it.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.ops.attention import causal_attention
from lowlat.ops.layout import EntryLayout


@final
@dataclass(frozen=True, slots=True)
class TiedLayout(EntryLayout):
    """One tied state of `head_dim` channels for each of `groups`, then the shared rotated key."""

    groups: int
    head_dim: int

    def expand(
        self, rows: Float[Tensor, "keys entry_dim"]
    ) -> tuple[Float[Tensor, "keys groups head_dim"], Float[Tensor, "keys groups head_dim"]]:
        tied = rows[:, : self.groups * self.head_dim].unflatten(1, (self.groups, self.head_dim))
        k_rope = rows[:, None, self.groups * self.head_dim :].expand(-1, self.groups, -1)
        nope = self.head_dim - k_rope.shape[-1]
        return torch.cat([tied[..., :nope], k_rope], dim=-1), tied

    def attend(
        self,
        q: Float[Tensor, "queries heads head_dim"],
        rows: Float[Tensor, "keys entry_dim"],
        *,
        start: int,
        scale: float,
    ) -> Float[Tensor, "queries heads head_dim"]:
        def key_values(first: int, last: int) -> tuple[Tensor, Tensor]:
            return self.expand(rows[first:last])

        return causal_attention(q, key_values, start=start, scale=scale)


def selectors(
    heads: int, groups: int, head_dim: int, nope_dim: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "heads nope_dim latent"], Float[Tensor, "heads head_dim latent"]]:
    """0/1 up-projections W_UK and W_UV that express grouped-tied as latent attention."""
    identity = torch.eye(groups * head_dim, dtype=dtype).unflatten(0, (groups, head_dim))
    w_uv = identity.repeat_interleave(heads // groups, dim=0)
    return w_uv[:, :nope_dim], w_uv
