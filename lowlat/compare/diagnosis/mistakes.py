"""Known mistakes, and the result of an audited step: correct, a known mistake, or neither."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

EXPLAINED, NARROW = 1e-3, 2e-2
"""Largest relative difference of a reproduced step; NARROW for NARROW_TYPES."""
NARROW_TYPES = (torch.bfloat16, torch.float16, torch.int8)

MistakeKind = Literal[
    "yarn_cos_sin",
    "yarn_softmax_scale",
    "softmax_scale",
    "rope_frequencies",
    "rope_layout",
    "rope_missing",
    "rope_order",
    "group_mask",
    "group_rank",
    "bias_in_weights",
    "bias_not_in_choice",
    "gate_precision",
    "gate_normalisation",
    "gate_scaling",
    "mtp_order",
    "mtp_hidden",
    "mtp_zeroed",
]


class Mistake(NamedTuple):
    """A mistake that reproduces the recorded output."""

    kind: MistakeKind
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
