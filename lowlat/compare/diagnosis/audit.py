"""Audit of a trace against its config: recompute each step as configured and with known mistakes.

Every step is recomputed from its recorded inputs. The implementation computes the variant that
reproduces the recorded output; the size of a difference is not used. Steps: RoPE of queries and
keys, softmax scale, MTP input (this module), router (`gate_audit`), indexer (`index_audit`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lowlat.compare.diagnosis.gate_audit import gate
from lowlat.compare.diagnosis.index_audit import indexer
from lowlat.compare.diagnosis.mistakes import (
    UNEXPLAINED,
    Mistake,
    StepAudit,
    limit_of,
    relative_difference,
)
from lowlat.compare.diagnosis.rope_reference import (
    RotationFit,
    best_fit,
    correct_variant,
    cos_sin_scale,
    cos_sin_scales,
)
from lowlat.compare.trace import OUTPUT, Block, Place, Trace, Window, layer_number
from lowlat.config.model import MLAConfig, ModelConfig, RopeConfig, yarn_mscale

SAME_SCALE = 1e-5
"""Largest relative difference of equal softmax scales."""
AUDITED = {
    "q_rotated": "RoPE of queries",
    "k_rotated": "RoPE of keys",
    "scores": "softmax scale",
    "router_scores": "router scores",
    "routing_weights": "expert selection",
    "index_scores": "index scores",
    "index_choice": "choice of tokens",
    "joined": "MTP input",
}
"""Descriptions of the audited steps."""


def audit(trace: Trace, config: ModelConfig, window: Window) -> dict[Place, StepAudit]:
    """Audit every step whose inputs and output are in the trace."""
    found: dict[Place, StepAudit] = {}
    for block in trace.blocks():
        if block.stage not in ("layer", "mtp"):
            continue
        steps = {
            "joined": _join(trace, config, block),
            "q_rotated": _rotation(trace, config, block, window, "q"),
            "k_rotated": _rotation(trace, config, block, window, "k"),
            "scores": _scale(trace, config, block),
            **indexer(trace, config, block, window),
            **gate(trace, config, block),
        }
        found |= {Place(block, part): out for part, out in steps.items() if out is not None}
    return found


# Rotation


def _rotation(
    trace: Trace, config: ModelConfig, block: Block, window: Window, name: str
) -> StepAudit | None:
    layer = layer_number(config, block)
    rope, width = config.rope_of(layer), config.attention_of(layer).rope_dim
    before, after = trace.get(block, name), trace.get(block, f"{name}_rotated")
    if before is None or after is None or before.shape != after.shape or not width:
        return None
    late = block.number + 1 if block.stage == "mtp" else 0
    positions = window.positions[late : late + len(before)]
    limit = limit_of(trace.dtype if name == "q" else trace.cached or trace.dtype)
    best = best_fit(before[..., -width:], after[..., -width:], positions, rope, limit)
    if not best.error <= limit:
        return UNEXPLAINED
    return StepAudit(mistakes=tuple(_rotation_mistakes(best, rope, limit, name)))


def _rotation_mistakes(
    fit: RotationFit, rope: RopeConfig, limit: float, name: str
) -> Iterator[Mistake]:
    variant, should = fit.variant, correct_variant(rope)
    what = "queries" if name == "q" else "keys"
    pairs = {True: "(2i, 2i+1)", False: "(i, i + d/2)"}
    if variant.frequencies == "none":
        yield Mistake("rope_missing", f"does not rotate the {what}")
        return
    if variant.interleave != should.interleave:
        yield Mistake(
            "rope_layout",
            f"rotates pairs {pairs[variant.interleave]} of the {what}, not "
            f"{pairs[should.interleave]} as in the checkpoint",
        )
    elif variant.order != should.order:
        yield Mistake("rope_order", f"leaves the rotated channels of the {what} in another order")
    if variant.offset:
        sign = "+" if variant.offset > 0 else "-"
        yield Mistake(
            "position_offset",
            f"rotates the {what} at position p {sign} {abs(variant.offset):,}, not p",
        )
    if variant.frequencies == "unscaled":
        yield Mistake("rope_frequencies", f"does not scale the frequencies for {rope.rope_type}")
    expected = cos_sin_scale(rope)
    if not _near(expected, fit.ratio, limit):
        known = [why for value, why in cos_sin_scales(rope) if _near(value, fit.ratio, limit)]
        reason = f": {known[0]}" if known and known[0] else ""
        yield Mistake(
            "yarn_cos_sin",
            f"scales cos and sin of the {what} by {fit.ratio:.4f}, not {expected:.4f}{reason}",
        )


def _near(value: float, found: float, limit: float) -> bool:
    return value != 0 and abs(found / value - 1) <= limit


# Softmax scale


def _scale(trace: Trace, config: ModelConfig, block: Block) -> StepAudit | None:
    noted = trace.get(block, "scale")
    if noted is None:
        return None
    layer, found = layer_number(config, block), float(noted)
    should = config.softmax_scale_of(layer)
    if _near(should, found, SAME_SCALE):
        return StepAudit()
    is_yarn = config.rope_of(layer).rope_type == "yarn"
    known = [why for value, why in _wrong_scales(config, layer) if _near(value, found, SAME_SCALE)]
    if not known and not is_yarn:
        return UNEXPLAINED
    reason = f": {known[0]}" if known else ""
    kind = "yarn_softmax_scale" if is_yarn else "softmax_scale"
    return StepAudit(
        mistakes=(Mistake(kind, f"scales scores by {found:.6f}, not {should:.6f}{reason}"),)
    )


def _wrong_scales(config: ModelConfig, layer: int) -> list[tuple[float, str]]:
    """Wrong softmax scales with their causes; the first match is reported."""
    attention, rope = config.attention_of(layer), config.rope_of(layer)
    base = attention.qk_head_dim**-0.5
    every = yarn_mscale(rope.factor, rope.mscale_all_dim or 0.0)
    other = yarn_mscale(rope.factor, rope.mscale or 0.0)
    plain = yarn_mscale(rope.factor, 1.0)
    wrong = [
        (base, "m(mscale_all_dim)^2 is missing"),
        (base * every, "m(mscale_all_dim) is not squared"),
        (base * every**4, "m(mscale_all_dim)^2 is applied twice"),
        (base * other**2, "m(mscale)^2 is used instead of m(mscale_all_dim)^2"),
        (base * plain**2, "mscale_all_dim is ignored"),
    ]
    if isinstance(attention, MLAConfig) and attention.qk_nope_head_dim:
        nope = attention.qk_nope_head_dim**-0.5
        wrong += [(scale, "the RoPE channels are not counted") for scale in (nope, nope * every**2)]
    return wrong


# MTP input: order of embedding and hidden state, and which hidden state


def _join(trace: Trace, config: ModelConfig, block: Block) -> StepAudit | None:
    if block.stage != "mtp":
        return None
    names = ("embedded", "carried", "enorm", "hnorm", "eh_proj", "joined")
    seen = [trace.get(block, name) for name in names]
    if any(value is None for value in seen):
        return None
    embedded, carried, enorm, hnorm, weight, joined = (v for v in seen if v is not None)
    e = _normed(embedded, enorm, config.rms_norm_eps)
    h = _normed(carried, hnorm, config.rms_norm_eps)
    in_order = relative_difference(joined, torch.cat([e, h], dim=-1) @ weight.T)
    swapped = relative_difference(joined, torch.cat([h, e], dim=-1) @ weight.T)
    limit = limit_of(trace.dtype)
    mistakes = []
    if swapped < in_order and swapped <= limit:
        detail = "concatenates the hidden state before the embedding, not after it"
        mistakes.append(Mistake("mtp_order", detail))
    elif in_order > limit:
        return UNEXPLAINED
    mistakes += _hidden_mistakes(trace, config, block, carried, limit)
    if float(embedded[0].abs().max()) == 0.0 and float(embedded.abs().max()) > 0.0:
        mistakes.append(Mistake("mtp_zeroed", "zeroes the embedding of the first position"))
    return StepAudit(mistakes=tuple(mistakes))


def _hidden_mistakes(
    trace: Trace, config: ModelConfig, block: Block, carried: Tensor, limit: float
) -> list[Mistake]:
    """Check the hidden state that the module gets: before or after the previous norm."""
    depth = block.number
    before = OUTPUT if depth == 0 else Block("mtp", depth - 1)
    last = Block("layer", config.num_hidden_layers - 1) if depth == 0 else before
    normed, raw = trace.get(before, "norm"), trace.get(last, "residual")
    if normed is None or raw is None:
        return []
    count = len(carried)
    as_normed = relative_difference(carried, normed[:count])
    as_raw = relative_difference(carried, raw[:count])
    if as_raw < as_normed and as_raw <= limit:
        detail = "takes the hidden state before the final norm, not after it"
        return [Mistake("mtp_hidden", detail)]
    return []


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
