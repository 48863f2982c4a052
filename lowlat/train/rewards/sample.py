"""Records of reward functions: the samples they score, the scores, and settings of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FailureKind = Literal[
    "raised", "timed out", "out of memory", "not finite", "not a number", "crashed"
]


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion to score. All fields are JSON values."""

    prompt: str | Sequence[Mapping[str, Any]]
    """The text, or the chat messages."""
    completion: str
    """Text of the completion, reasoning tags included, without its end token."""
    record: Mapping[str, Any]
    """The prompt's record: answer, schema and other fields that rewards read."""
    num_tokens: int = 0
    """Tokens of the completion."""


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """Why a reward function gave no score for a sample."""

    reward: str
    """Name of the reward function."""
    kind: FailureKind
    detail: str
    """The exception, value, limit or signal, in one line."""

    def __str__(self) -> str:
        return f"{self.reward}: {self.kind}{': ' if self.detail else ''}{self.detail}"


Score = float | RewardFailure


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardContext:
    """Facts of a run that the built-in rewards use."""

    max_completion_length: int = 512
    """Most tokens of a completion."""
    reasoning_open: str = "<think>"
    """Tags around reasoning, those of the model's chat template if it has any."""
    reasoning_close: str = "</think>"
    is_reasoning_open: bool = False
    """Whether the generation prompt has the opening tag, so that completions begin after it."""
