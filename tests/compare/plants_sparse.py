"""Mistakes in sparse attention (DSA), in lowlat and in transformers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

from lowlat.attention.cached import CachedAttention
from lowlat.model import indexer, linear
from lowlat.model.indexer import HeadWeights, Indexer
from lowlat.ops import sparse_attention
from lowlat.ops.rope import RotaryTable, apply_rope
from lowlat.ops.sparse_attention import IndexQueries

from .models import Patch
from .plant import Plant, replace_function

FACTORS = ("index_scale", "index_head_weights")
"""Mistakes that change no choice: only index scores show them."""
ATTEND = CachedAttention.sparse_mla
WIDTH = 17
"""qk_head_dim of `sparse_case`."""


def other_layout(x: Tensor, table: RotaryTable, *, interleave: bool) -> Tensor:
    return apply_rope(x, table, interleave=not interleave)


def last_channels(self: Indexer, x: Tensor, rope: RotaryTable) -> Tensor:
    rest, rotary = x.split([x.shape[-1] - self.rope_dim, self.rope_dim], dim=-1)
    turned = apply_rope(rotary, rope, interleave=self.dims.rope_interleave)
    return torch.cat([rest, turned], dim=-1)


def scores(*, relu: bool = True, width: int | None = None) -> Callable[..., Tensor]:
    def index_scores(index: IndexQueries, keys: Tensor) -> Tensor:
        products = torch.einsum("qhd,kd->qhk", index.q.float(), keys.float())
        products = products * (width or keys.shape[1]) ** -0.5
        return torch.einsum("qh,qhk->qk", index.weights, products.relu() if relu else products)

    return index_scores


def without_factor(self: HeadWeights, x: Tensor) -> Tensor:
    return F.linear(x, self.weight)


def without_bias(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, torch.zeros_like(bias), eps)


def unmasked(scores: Tensor, *, start: int, topk: int) -> Tensor:
    """Later tokens take places of the choice, and are left out by attention."""
    best = scores.topk(topk, dim=-1).indices.sort(dim=-1).values
    query = torch.arange(start, start + len(scores))[:, None]
    return torch.where(best <= query, best, best.amin(dim=1, keepdim=True))


def all_keys(index: IndexQueries, keys: Tensor, *, start: int) -> Tensor:
    made = sparse_attention.index_scores(index, keys)[index.topk :]
    return sparse_attention.top_positions(made, start=start + index.topk, topk=index.topk)


def before_the_mask(patch: Any) -> None:
    from lowlat.attention import cached

    patch.setattr(sparse_attention, "top_positions", unmasked)
    patch.setattr(cached, "choose_tokens", all_keys)


def first_choice(self: CachedAttention, *arguments: Any) -> Tensor:
    """Layers that share a choice take the first one."""
    if arguments[-1] is None:
        self._chosen = self.first  # type: ignore[attr-defined]
    out = ATTEND(self, *arguments)
    if not hasattr(self, "first"):
        self.first = self._chosen  # type: ignore[attr-defined]
    return out


def own(name: str, plant: Patch, kind: str, says: str, first: str = "index_scores") -> Plant:
    return Plant(name=f"DSA: {name}", plant=plant, kind=kind, first=first, says=says)


SPARSE = [
    own(
        "the other layout",
        replace_function(indexer, "apply_rope", other_layout),
        "index_rope_layout",
        "rotates pairs (i, i + d/2) of the indexer, not (2i, 2i+1)",
    ),
    own(
        "last channels rotated",
        replace_function(Indexer, "_rotate", last_channels),
        "index_rope_channels",
        "rotates the last channels of index queries and keys, not the first",
    ),
    own(
        "scale of the heads",
        replace_function(sparse_attention, "index_scores", scores(width=WIDTH)),
        "index_scale",
        "scales index scores by qk_head_dim^-0.5, not by index_head_dim^-0.5",
    ),
    own(
        "no ReLU",
        replace_function(sparse_attention, "index_scores", scores(relu=False)),
        "index_relu",
        "sums index scores without ReLU",
    ),
    own(
        "head weights without factor",
        replace_function(HeadWeights, "forward", without_factor),
        "index_head_weights",
        "weights index heads without the factor index_n_heads^-0.5",
    ),
    own(
        "norm without bias",
        replace_function(linear, "layer_norm", without_bias),
        "index_key_norm",
        "normalises index keys without the bias of k_norm",
    ),
    own(
        "choice before the mask",
        before_the_mask,
        "index_causal",
        "chooses before the causal mask",
        "index_choice",
    ),
    own(
        "choice of the first layer",
        replace_function(CachedAttention, "sparse_mla", first_choice),
        "index_layer",
        "attends to the tokens that layer 0 chose, not to those of layer 1",
        "index_choice",
    ),
]


def their_indexer(
    *, relu: bool = True, bias: bool = True, last: bool = False, masked: bool = True
) -> Callable[..., Tensor]:
    """GlmMoeDsaIndexer.forward with a mistake; the defaults are right."""

    def forward(
        self: Any, x: Tensor, q_latent: Tensor, tables: Any, mask: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        keys = self.wk(x)
        keys = self.k_norm(keys) - (0 if bias else self.k_norm.bias)
        q, k = self.wq_b(q_latent).unflatten(-1, (self.n_heads, -1)), keys.unsqueeze(2)
        rotary, rest = self.qk_rope_head_dim, self.head_dim - self.qk_rope_head_dim
        sizes, at = ([rest, rotary], 1) if last else ([rotary, rest], 0)
        parts = [list(one.split(sizes, dim=-1)) for one in (q, k)]
        turned = glm.apply_rotary_pos_emb_interleave(
            parts[0][at], parts[1][at], *tables, unsqueeze_dim=2
        )
        for part, new in zip(parts, turned, strict=True):
            part[at] = new
        q, k = (torch.cat(part, dim=-1) for part in parts)
        made = torch.einsum("bqhd,bkd->bqhk", q, k[:, :, 0]) * self.softmax_scale
        made = made.relu() if relu else made
        weights = self.weights_proj(x) * self.n_heads**-0.5
        total = torch.einsum("bqh,bqhk->bqk", weights, made)
        total = total + mask if masked else total
        return total.topk(min(self.index_topk, total.shape[-1]), dim=-1).indices.int()

    return forward


def their_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    return v32.apply_rotary_pos_emb(q, k, cos, sin, **options)


def halved(self: Any, *arguments: Any, **named: Any) -> Tensor:
    made, interleaved = their_indexer(), glm.apply_rotary_pos_emb_interleave
    glm.apply_rotary_pos_emb_interleave = their_halves
    try:
        return made(self, *arguments, **named)
    finally:
        glm.apply_rotary_pos_emb_interleave = interleaved


def their_first_choice(patch: Any) -> None:
    """The third layer takes the choice of the first."""
    forward, kept = glm.GlmMoeDsaAttention.forward, {}

    def attend(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.indexer is None:
            named["prev_topk_indices"] = kept[0]
        out = forward(self, *arguments, **named)
        kept.setdefault(self.layer_idx, out[2])
        return out

    patch.setattr(glm.GlmMoeDsaAttention, "forward", attend)


def theirs(name: str, plant: Patch, kind: str, says: str) -> Plant:
    return Plant(
        name=f"transformers: DSA, {name}",
        plant=plant,
        kind=kind,
        first="index_choice",
        says=says,
        implementation="transformers",
    )


def in_indexer(new: Callable[..., Tensor]) -> Patch:
    return replace_function(glm.GlmMoeDsaIndexer, "forward", new)


THEIR_SPARSE = [
    theirs("the other layout", in_indexer(halved), "index_rope_layout", "rotates pairs (i, i + d"),
    theirs(
        "last channels", in_indexer(their_indexer(last=True)), "index_rope_channels", "the last ch"
    ),
    theirs("no ReLU", in_indexer(their_indexer(relu=False)), "index_relu", "without ReLU"),
    theirs("no bias", in_indexer(their_indexer(bias=False)), "index_key_norm", "without the bias"),
    theirs(
        "before the mask",
        in_indexer(their_indexer(masked=False)),
        "index_causal",
        "chooses before the causal mask",
    ),
    theirs("first layer", their_first_choice, "index_layer", "tokens that layer 0 chose, not to"),
]
