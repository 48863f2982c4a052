"""The same mistakes in transformers, where its code can be made to make them."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

from .plant import PLAIN, Plant, replace_function

MTP_FORWARD = MtpLayer.forward
SCALE = theirs.yarn_apply_mscale
TURNED = theirs.apply_rotary_pos_emb_interleave
Turned = tuple[Tensor, Tensor]


def their_gate(
    *,
    fill: float = -math.inf,
    best: int = 2,
    biased: bool = False,
    choice: bool = True,
    in_groups: bool = True,
    product: torch.dtype = torch.float32,
    normalised: bool = True,
    scaled: bool = True,
) -> Callable[..., tuple[Tensor, ...]]:
    """DeepseekV3TopkRouter.forward with a mistake; the defaults are right."""

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(x.to(product), self.weight.to(product)).float()
        scores = logits.sigmoid()
        ranked = scores + self.e_score_correction_bias * choice
        groups = ranked.unflatten(-1, (self.num_group, -1))
        judged = (ranked if in_groups else scores).unflatten(-1, (self.num_group, -1))
        kept = judged.topk(best, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
        outside = torch.ones(groups.shape[:2], dtype=torch.bool).scatter_(1, kept, False)
        ranked_kept = groups.masked_fill(outside[..., None], fill).flatten(1)
        chosen = ranked_kept.topk(self.top_k, dim=-1).indices
        weights = (ranked if biased else scores).gather(1, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True) if normalised else weights
        return logits, weights * (self.routed_scaling_factor if scaled else 1.0), chosen

    return forward


def their_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Turned:
    return theirs.apply_rotary_pos_emb(q, k, cos, sin)


def left_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Turned:
    """Rotated pairs stay neighbours."""
    q, k = (torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2) for x in TURNED(q, k, cos, sin))
    return q, k


def keys_unrotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Turned:
    return TURNED(q, k, cos, sin)[0], torch.cat([k[..., 0::2], k[..., 1::2]], dim=-1)


def their_tables(
    *, scaled: bool = True, magnitude: bool = True, offset: int = 0
) -> Callable[..., Turned]:
    """DeepseekV3RotaryEmbedding.forward with scaled frequencies or magnitude left out."""

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Turned:
        count = len(self.inv_freq)
        plain = 1e4 ** -(torch.arange(count, dtype=torch.float32) / count)
        angles = (position_ids[..., None] + offset).float() * (self.inv_freq if scaled else plain)
        both, factor = torch.cat([angles, angles], dim=-1), self.attention_scaling
        factor = factor if magnitude else 1.0
        return (both.cos() * factor).to(x.dtype), (both.sin() * factor).to(x.dtype)

    return forward


def hidden_first(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    self.config.mtp_hidden_states_first = True
    return MTP_FORWARD(self, *args, **kwargs)


def first_zeroed(self: Any, inputs_embeds: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    later = torch.arange(inputs_embeds.shape[1])[:, None] > 0
    return MTP_FORWARD(self, inputs_embeds * later, *args, **kwargs)


def theirs_with(
    name: str,
    owner: Any,
    function: str,
    new: Callable[..., Any],
    kind: str,
    first: str,
    says: str,
    config: dict[str, Any] | None = None,
) -> Plant:
    return Plant(
        name=f"transformers: {name}",
        plant=replace_function(owner, function, new),
        kind=kind,
        first=first,
        says=says,
        config=config or {},
        implementation="transformers",
    )


def gate(name: str, kind: str, says: str, first: str = "routing_weights", **mistake: Any) -> Plant:
    owner, new = theirs.DeepseekV3TopkRouter, their_gate(**mistake)
    return theirs_with(name, owner, "forward", new, kind, first, says)


def turns(name: str, new: Callable[..., Turned], kind: str, first: str, says: str) -> Plant:
    return theirs_with(name, theirs, "apply_rotary_pos_emb_interleave", new, kind, first, says)


def tables(name: str, kind: str, says: str, **right: Any) -> Plant:
    owner, new = theirs.DeepseekV3RotaryEmbedding, their_tables(**right)
    return theirs_with(name, owner, "forward", new, kind, "q_rotated", says)


def scale(
    name: str,
    new: Callable[..., float],
    says: str,
    kind: str = "yarn_softmax_scale",
    config: dict[str, Any] | None = None,
) -> Plant:
    return theirs_with(name, theirs, "yarn_apply_mscale", new, kind, "scores", says, config)


def joins(name: str, new: Callable[..., Tensor], kind: str, says: str) -> Plant:
    return theirs_with(name, MtpLayer, "forward", new, kind, "joined", says)


THEIRS = [
    scale(
        "softmax not corrected",
        lambda settings, scaling: scaling,
        "m(mscale_all_dim)^2 is missing",
    ),
    scale(
        "softmax corrected twice",
        lambda settings, scaling: SCALE(settings, SCALE(settings, scaling)),
        "m(mscale_all_dim)^2 is applied twice",
    ),
    scale(
        "softmax without rotary channels",
        lambda settings, scaling: 7**-0.5,
        "the RoPE channels are not counted",
        "softmax_scale",
        PLAIN,
    ),
    tables(
        "cos and sin not corrected",
        "yarn_cos_sin",
        "the factor is not applied",
        scaled=True,
        magnitude=False,
    ),
    tables(
        "frequencies not scaled",
        "rope_frequencies",
        "does not scale the frequencies for yarn",
        scaled=False,
        magnitude=True,
    ),
    tables(
        "positions from 1", "position_offset", "rotates the queries at position p + 1", offset=1
    ),
    turns(
        "halves for neighbours",
        their_halves,
        "rope_layout",
        "q_rotated",
        "rotates pairs (i, i + d/2)",
    ),
    turns(
        "rotated channels in place",
        left_in_place,
        "rope_order",
        "q_rotated",
        "leaves the rotated channels of the queries in another order",
    ),
    turns(
        "keys not rotated", keys_unrotated, "rope_missing", "k_rotated", "does not rotate the keys"
    ),
    gate("discarded groups filled with 0", "group_mask", "fills discarded groups with 0", fill=0.0),
    gate(
        "groups ranked by their best expert",
        "group_rank",
        "ranks groups by their best expert",
        best=1,
    ),
    gate(
        "groups ranked without the bias",
        "group_rank",
        "ranks groups by their scores without the bias",
        in_groups=False,
    ),
    gate("bias in the weights", "bias_in_weights", "biased scores", biased=True),
    gate("no bias in the selection", "bias_not_in_choice", "without the bias", choice=False),
    gate(
        "gate in bf16",
        "gate_precision",
        "computes the router in bf16",
        "router_scores",
        product=torch.bfloat16,
    ),
    gate(
        "factors not normalised",
        "gate_normalisation",
        "does not normalise the routing weights",
        normalised=False,
    ),
    gate(
        "factors not scaled",
        "gate_scaling",
        "does not apply routed_scaling_factor",
        scaled=False,
    ),
    joins("hidden state first", hidden_first, "mtp_order", "before the embedding, not after it"),
    joins(
        "first embedding zeroed",
        first_zeroed,
        "mtp_zeroed",
        "zeroes the embedding of the first position",
    ),
]
