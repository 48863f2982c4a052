"""The mistakes of pitfalls in numerics, put into lowlat's code and into transformers'."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

from lowlat.config.model import ModelConfig, MoEConfig, RopeConfig, yarn_mscale
from lowlat.model import mla, moe, mtp
from lowlat.model.transformer import Transformer
from lowlat.ops import rope, routing
from lowlat.ops.routing import Routing

from .sides import EQUAL_SCALES, Patch


@dataclass(frozen=True, kw_only=True, slots=True)
class Plant:
    """A mistake, and how it must be reported."""

    name: str
    plant: Patch
    kind: str
    """The mistake's name in a report."""
    first: str
    """The part that differs first."""
    says: str
    """Part of the sentence."""
    rope: dict[str, Any] | None = None
    """Rotary settings of the model; None: mscale and mscale_all_dim unequal."""
    implementation: str = "lowlat"


def replace_function(owner: Any, name: str, new: Callable[..., Any]) -> Patch:
    return lambda patch: patch.setattr(owner, name, new)


# lowlat


def magnitude_without_denominator(settings: RopeConfig) -> float:
    return yarn_mscale(settings.factor, settings.mscale or 0.0)


def scale_without_yarn(self: ModelConfig, layer: int) -> float:
    return self.attention_of(layer).qk_head_dim ** -0.5


def scale_not_squared(self: ModelConfig, layer: int) -> float:
    settings = self.rope_of(layer)
    factor = yarn_mscale(settings.factor, settings.mscale_all_dim or 0.0)
    return self.attention_of(layer).qk_head_dim ** -0.5 * factor


def rotates_halves(x: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
    return rope.apply_rope(x, cos, sin, interleave=not interleave)


def rotates_keys_in_halves(x: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
    return rope.apply_rope(x, cos, sin, interleave=interleave == (x.shape[1] > 1))


def keys_unrotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
    return x if x.shape[1] == 1 else rope.apply_rope(x, cos, sin, interleave=interleave)


KEEP_BEST_GROUPS = routing._keep_best_groups


def zeros_for_discarded(choice: Tensor, settings: MoEConfig) -> Tensor:
    kept = KEEP_BEST_GROUPS(choice, settings)
    return kept.masked_fill(kept == -math.inf, 0.0)


def biased_weights(x: Tensor, gate: Tensor, bias: Tensor | None, settings: MoEConfig) -> Routing:
    found = routing.route(x, gate, bias, settings)
    assert bias is not None
    chosen = (found.scores + bias).gather(1, found.experts)
    weights = chosen / chosen.sum(dim=-1, keepdim=True) * settings.routed_scaling_factor
    return Routing(found.experts, weights, found.scores)


def unbiased_choice(x: Tensor, gate: Tensor, bias: Tensor | None, settings: MoEConfig) -> Routing:
    assert bias is not None
    return routing.route(x, gate, torch.zeros_like(bias), settings)


def narrow_gate(x: Tensor, gate: Tensor, bias: Tensor | None, settings: MoEConfig) -> Routing:
    """A product in bf16, cast up too late: the scores that `route` makes of it."""
    logits = (x.bfloat16() @ gate.bfloat16().T).to(x.dtype)
    return routing.route(logits, torch.eye(logits.shape[1], dtype=x.dtype), bias, settings)


def hidden_first(self: Any, hidden: Tensor, embedded: Tensor, tables: Any, backend: Any) -> Tensor:
    joined = torch.cat([self.hnorm(hidden), self.enorm(embedded)], dim=-1)
    return self.norm(self.block(self.eh_proj(joined), tables, backend))


MTP_HIDDEN = Transformer.mtp_hidden


def carries_raw(patch: pytest.MonkeyPatch) -> None:
    """The state in front of the final norm goes into the first MTP module."""
    state: dict[str, Tensor] = {}

    def forward(self: Transformer, *args: Any, **kwargs: Any) -> Tensor:
        hook = self.norm.register_forward_hook(
            lambda _, inputs, out: state.__setitem__("raw", inputs[0])
        )
        out = FORWARD(self, *args, **kwargs)
        hook.remove()
        return out

    def mtp_hidden(self: Transformer, depth: int, hidden: Tensor, *rest: Any) -> Tensor:
        given = state["raw"][: len(hidden)] if depth == 0 else hidden
        return MTP_HIDDEN(self, depth, given, *rest)

    patch.setattr(Transformer, "forward", forward)
    patch.setattr(Transformer, "mtp_hidden", mtp_hidden)


FORWARD = Transformer.forward


# transformers


def their_gate(fill: float = -math.inf, biased: bool = False, narrow: bool = False) -> Any:
    """DeepseekV3TopkRouter.forward with a mistake."""

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        kind = torch.bfloat16 if narrow else torch.float32
        logits = F.linear(x.to(kind), self.weight.to(kind)).float()
        scores = logits.sigmoid()
        ranked = scores + self.e_score_correction_bias
        groups = ranked.unflatten(-1, (self.num_group, -1))
        kept = groups.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
        outside = torch.ones(groups.shape[:2], dtype=torch.bool).scatter_(1, kept, False)
        ranked_kept = groups.masked_fill(outside[..., None], fill).flatten(1)
        chosen = ranked_kept.topk(self.top_k, dim=-1).indices
        weights = (ranked if biased else scores).gather(1, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True) * self.routed_scaling_factor
        return logits, weights, chosen

    return forward


def their_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return theirs.apply_rotary_pos_emb(q, k, cos, sin)


def their_tables(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].float() * self.inv_freq
    both = torch.cat([angles, angles], dim=-1)
    return both.cos().to(x.dtype), both.sin().to(x.dtype)


PLANTS = [
    Plant(
        name="YaRN: cos and sin not corrected",
        plant=replace_function(rope, "rotation_magnitude", lambda settings: 1.0),
        kind="yarn_cos_sin",
        first="q_rotated",
        says="the factor is not applied",
    ),
    Plant(
        name="YaRN: cos and sin without the denominator",
        plant=replace_function(rope, "rotation_magnitude", magnitude_without_denominator),
        kind="yarn_cos_sin",
        first="q_rotated",
        says="the denominator m(mscale_all_dim) is missing",
    ),
    Plant(
        name="YaRN: cos and sin without the denominator, equal scales",
        plant=replace_function(rope, "rotation_magnitude", magnitude_without_denominator),
        kind="yarn_cos_sin",
        first="q_rotated",
        says="scales cos and sin",
        rope=EQUAL_SCALES,
    ),
    Plant(
        name="YaRN: softmax not corrected",
        plant=replace_function(ModelConfig, "softmax_scale_of", scale_without_yarn),
        kind="yarn_softmax_scale",
        first="scores",
        says="m(mscale_all_dim)^2 is missing",
    ),
    Plant(
        name="YaRN: softmax not corrected, equal scales",
        plant=replace_function(ModelConfig, "softmax_scale_of", scale_without_yarn),
        kind="yarn_softmax_scale",
        first="scores",
        says="m(mscale_all_dim)^2 is missing",
        rope=EQUAL_SCALES,
    ),
    Plant(
        name="YaRN: softmax correction not squared",
        plant=replace_function(ModelConfig, "softmax_scale_of", scale_not_squared),
        kind="yarn_softmax_scale",
        first="scores",
        says="m(mscale_all_dim) is not squared",
    ),
    Plant(
        name="RoPE: halves for neighbours",
        plant=replace_function(mla, "apply_rope", rotates_halves),
        kind="rope_layout",
        first="q_rotated",
        says="rotates pairs (i, i + d/2) of the queries, not (2i, 2i+1)",
    ),
    Plant(
        name="RoPE: keys in halves",
        plant=replace_function(mla, "apply_rope", rotates_keys_in_halves),
        kind="rope_layout",
        first="k_rotated",
        says="rotates pairs (i, i + d/2) of the keys, not (2i, 2i+1)",
    ),
    Plant(
        name="RoPE: keys not rotated",
        plant=replace_function(mla, "apply_rope", keys_unrotated),
        kind="rope_missing",
        first="k_rotated",
        says="does not rotate the keys",
    ),
    Plant(
        name="groups: discarded ones filled with 0",
        plant=replace_function(routing, "_keep_best_groups", zeros_for_discarded),
        kind="group_mask",
        first="router",
        says="fills discarded groups with 0, not -inf",
    ),
    Plant(
        name="router bias: in the weights",
        plant=replace_function(moe, "route", biased_weights),
        kind="bias_in_weights",
        first="router",
        says="takes the experts' factors from the biased scores",
    ),
    Plant(
        name="router bias: not in the selection",
        plant=replace_function(moe, "route", unbiased_choice),
        kind="bias_not_in_choice",
        first="router",
        says="selects experts without the bias",
    ),
    Plant(
        name="gate: product in bf16",
        plant=replace_function(moe, "route", narrow_gate),
        kind="gate_precision",
        first="gate",
        says="computes the gate in bf16",
    ),
    Plant(
        name="MTP: hidden state first",
        plant=replace_function(mtp.MTPModule, "forward", hidden_first),
        kind="mtp_order",
        first="joined",
        says="not embedding first",
    ),
    Plant(
        name="MTP: hidden state in front of the final norm",
        plant=carries_raw,
        kind="mtp_hidden",
        first="joined",
        says="carries the hidden state from before the final norm",
    ),
    Plant(
        name="transformers: softmax not corrected",
        plant=replace_function(theirs, "yarn_apply_mscale", lambda settings, scaling: scaling),
        kind="yarn_softmax_scale",
        first="scores",
        says="m(mscale_all_dim)^2 is missing",
        implementation="transformers",
    ),
    Plant(
        name="transformers: cos and sin not corrected",
        plant=replace_function(theirs.DeepseekV3RotaryEmbedding, "forward", their_tables),
        kind="yarn_cos_sin",
        first="q_rotated",
        says="the factor is not applied",
        implementation="transformers",
    ),
    Plant(
        name="transformers: halves for neighbours",
        plant=replace_function(theirs, "apply_rotary_pos_emb_interleave", their_halves),
        kind="rope_layout",
        first="q_rotated",
        says="rotates pairs (i, i + d/2)",
        implementation="transformers",
    ),
    Plant(
        name="transformers: discarded groups filled with 0",
        plant=replace_function(theirs.DeepseekV3TopkRouter, "forward", their_gate(fill=0.0)),
        kind="group_mask",
        first="router",
        says="fills discarded groups with 0",
        implementation="transformers",
    ),
    Plant(
        name="transformers: bias in the weights",
        plant=replace_function(theirs.DeepseekV3TopkRouter, "forward", their_gate(biased=True)),
        kind="bias_in_weights",
        first="router",
        says="biased scores",
        implementation="transformers",
    ),
    Plant(
        name="transformers: gate in bf16",
        plant=replace_function(theirs.DeepseekV3TopkRouter, "forward", their_gate(narrow=True)),
        kind="gate_precision",
        first="gate",
        says="computes the gate in bf16",
        implementation="transformers",
    ),
]
