"""What an audited step was found to do: as the config says, by a known mistake, or neither."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

EXPLAINED, NARROW = 1e-3, 2e-2
"""Largest relative difference of a step that was reproduced; NARROW for NARROW_TYPES."""
NARROW_TYPES = (torch.bfloat16, torch.float16, torch.int8)

Kind = Literal[
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
    """A mistake that reproduces what was seen."""

    kind: Kind
    detail: str
    """What is done and what should be, without a subject: 'pairs channels ..., not ...'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a step was found to do."""

    mistakes: tuple[Mistake, ...] = ()
    """None: it does what the config says, if it is explained."""
    explained: bool = True
    """Some way of computing it reproduces what was seen."""


UNEXPLAINED = Outcome(explained=False)


def limit_of(dtype: torch.dtype) -> float:
    """The largest relative difference that still is a reproduction of what is held in `dtype`."""
    return NARROW if dtype in NARROW_TYPES else EXPLAINED


def off(found: Tensor, expected: Tensor) -> float:
    """Relative difference."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
