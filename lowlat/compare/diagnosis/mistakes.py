"""Known mistakes, and the result of an audited step: correct, a known mistake, or neither."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EXPLAINED, NARROW = 1e-3, 2e-2
"""Largest relative difference of a reproduced step; NARROW for NARROW_TYPES."""
NARROW_TYPES = (torch.bfloat16, torch.float16, torch.int8)

NAMES = {
    "yarn_cos_sin": "YaRN scale of cos and sin",
    "yarn_softmax_scale": "YaRN scale of the softmax",
    "softmax_scale": "softmax scale",
    "rope_frequencies": "RoPE frequencies",
    "rope_layout": "RoPE layout",
    "position_offset": "offset of positions",
    "rope_missing": "missing RoPE",
    "rope_order": "order of RoPE channels",
    "group_mask": "group mask",
    "group_rank": "ranking of groups",
    "bias_in_weights": "bias in the routing weights",
    "bias_not_in_choice": "bias missing in the selection",
    "gate_precision": "router precision",
    "gate_normalisation": "normalisation of the routing weights",
    "gate_scaling": "routed_scaling_factor",
    "index_rope_layout": "RoPE layout of the indexer",
    "index_rope_channels": "RoPE channels of the indexer",
    "index_scale": "scale of index scores",
    "index_relu": "ReLU of index scores",
    "index_head_weights": "weights of index heads",
    "index_key_norm": "norm of index keys",
    "index_causal": "causal mask of the choice",
    "index_layer": "layer of the choice",
    "mtp_order": "MTP concatenation order",
    "mtp_hidden": "MTP hidden state",
    "mtp_zeroed": "MTP embedding of the first position",
}
"""Descriptions of the mistakes, by kind."""


class Mistake(NamedTuple):
    """A mistake that reproduces the recorded output."""

    kind: str
    """A key of NAMES."""
    detail: str
    """Actual and expected behaviour, without a subject: 'pairs channels ..., not ...'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepAudit:
    """Result of auditing one step of an implementation."""

    mistakes: tuple[Mistake, ...] = ()
    """Known mistakes; empty for an explained step that follows the config."""
    explained: bool = True
    """Whether the config or a known mistake reproduces the recorded output."""


UNEXPLAINED = StepAudit(explained=False)


def limit_of(dtype: torch.dtype) -> float:
    """Largest relative difference of a reproduced step with values in `dtype`."""
    return NARROW if dtype in NARROW_TYPES else EXPLAINED


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
