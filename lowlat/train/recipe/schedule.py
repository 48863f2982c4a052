"""Schedules of a recipe: learning rate, loss weights and batch size of each optimizer step.

All values are pure functions of recipe and step, so checkpoints store no scheduler state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lowlat.train.recipe.schema import DataConfig, Phase, Recipe, Schedule, Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One optimizer step."""

    step: int
    """From 0, over all phases."""
    phase_index: int
    """Index of the phase in the recipe."""
    phase: Phase
    first_row: int
    """Position in the phase's data: rows consumed before this step, earlier phases included."""
    rows: int
    """Rows of the global batch."""
    learning_rate: float
    mtp_weight: float
    """Weight of the MTP loss (lambda)."""
    bias_update_speed: float
    """Update speed of the routing bias (gamma)."""
    ends_phase: bool
    """Whether this is the last step of its phase."""
    begins_phase: bool = False
    """Whether it is the first."""

    @property
    def tokens(self) -> int:
        """Input tokens of the step."""
        return self.rows * self.phase.sequence_length


def value_at(schedule: Schedule, step: int, steps: int) -> float:
    """Learning rate schedule, also of other values: warmup, constant, linear and cosine decay.

    `step` counts from 0 in a phase of `steps` steps. A segment of n steps reaches its end value at
    its n-th step, so a warmup starts above 0. After the last segment its end value holds.
    """
    if not isinstance(schedule, list):
        return float(schedule)
    start, first = 0.0, 0
    for segment in schedule:
        length = segment.steps if segment.steps is not None else max(1, steps - first)
        if step < first + length:
            return _within_segment(segment, start, (step - first + 1) / length)
        start, first = segment.to, first + length
    return start


def _within_segment(segment: Segment, start: float, share: float) -> float:
    match segment.shape:
        case "constant":
            return segment.to
        case "linear":
            return start + (segment.to - start) * share
        case "cosine":
            return segment.to + (start - segment.to) * 0.5 * (1 + math.cos(math.pi * share))


def batch_size(phase: Phase, step: int, unit: int) -> int:
    """Global batch size at `step` of `phase`, in sequences: a multiple of `unit`, at least one.
    Rounding changes only batch size ramps.
    """
    return max(1, round(value_at(phase.batch_size, step, phase.steps) / unit)) * unit


def most_rows(phase: Phase, unit: int) -> int:
    """Rows of the largest global batch of `phase`, rounded as by `batch_size`.

    Every segment has its extremes at its ends.
    """
    rows = phase.batch_size
    most = max(segment.to for segment in rows) if isinstance(rows, list) else rows
    return max(1, round(most / unit)) * unit


def data_of(recipe: Recipe, index: int) -> DataConfig | None:
    """The data of phase `index`; None for a GRPO phase, which has prompts."""
    phase = recipe.phase[index]
    return None if phase.grpo is not None else phase.data or recipe.data


def data_begins(recipe: Recipe, index: int) -> int:
    """Index of the phase that starts the data of phase `index`, possibly itself.

    A phase with the same data and sequence length as the phase before continues at its position.
    """
    while index and _reads(recipe, index) == _reads(recipe, index - 1):
        index -= 1
    return index


def _reads(recipe: Recipe, index: int) -> tuple[DataConfig | None, int]:
    return data_of(recipe, index), recipe.phase[index].sequence_length


class TrainingSchedule:
    """The optimizer steps of a recipe; `ranks` data-parallel processes share each batch."""

    def __init__(self, recipe: Recipe, *, ranks: int = 1) -> None:
        self._phases: Sequence[Phase] = recipe.phase
        self._rows = [
            [batch_size(phase, step, phase.micro_batch_size * ranks) for step in range(phase.steps)]
            for phase in recipe.phase
        ]
        self._before = [list(accumulate(rows, initial=0)) for rows in self._rows]
        totals = [before[-1] for before in self._before]
        self._first = [
            sum(totals[data_begins(recipe, index) : index]) for index in range(len(totals))
        ]
        self.steps = sum(phase.steps for phase in recipe.phase)
        """Optimizer steps of all phases."""
        self.tokens = self.tokens_before(self.steps)
        """Input tokens of all phases."""

    def tokens_before(self, step: int) -> int:
        """Input tokens of the steps before `step`."""
        total = 0
        for phase, before in zip(self._phases, self._before, strict=True):
            within = min(max(step, 0), phase.steps)
            total += before[within] * phase.sequence_length
            step -= phase.steps
        return total

    def at(self, step: int) -> StepPlan:
        """The plan of `step`; 0 <= step < steps."""
        index, within = 0, step
        while within >= self._phases[index].steps:
            within -= self._phases[index].steps
            index += 1
        phase = self._phases[index]
        return StepPlan(
            step=step,
            phase_index=index,
            phase=phase,
            first_row=self._first[index] + self._before[index][within],
            rows=self._rows[index][within],
            learning_rate=value_at(phase.learning_rate, within, phase.steps),
            mtp_weight=value_at(phase.mtp_weight, within, phase.steps),
            bias_update_speed=value_at(phase.bias_update_speed, within, phase.steps),
            ends_phase=within == phase.steps - 1,
            begins_phase=within == 0,
        )
