"""Audit of the MTP input (eh_proj): order of embedding and hidden state, and which hidden state."""

import torch
from torch import Tensor

from lowlat.compare.diagnosis.mistakes import (
    UNEXPLAINED,
    Mistake,
    StepAudit,
    limit_of,
    relative_difference,
)
from lowlat.compare.trace import OUTPUT, Block, Trace
from lowlat.config.model import ModelConfig


def join(trace: Trace, config: ModelConfig, block: Block) -> StepAudit | None:
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
    mistakes += _carried(trace, config, block, carried, limit)
    if float(embedded[0].abs().max()) == 0.0 and float(embedded.abs().max()) > 0.0:
        mistakes.append(Mistake("mtp_zeroed", "zeroes the embedding of the first position"))
    return StepAudit(mistakes=tuple(mistakes))


def _carried(
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
