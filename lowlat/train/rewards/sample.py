"""Records of reward functions: the samples they score, the scores, and settings of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FailureKind = Literal[
    "raised", "timed out", "out of memory", "not finite", "not a number", "not a text", "crashed"
]
FunctionName = Literal["reward", "tool"]
"""Functions of users' Python files."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion to score. All fields are JSON values."""

    prompt: str | Sequence[Mapping[str, Any]]
    """The text, or the chat messages, earlier turns and tool messages included."""
    completion: str
    """Text of the last turn, reasoning tags included, without its end token."""
    record: Mapping[str, Any]
    """The prompt's record: answer, schema and other fields that rewards read."""
    num_tokens: int = 0
    """Sampled tokens of all turns."""


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """Why a reward function gave no score for a sample, or a tool no answer."""

    reward: str
    """Name of the reward function, or the tool's file."""
    kind: FailureKind
    detail: str
    """The exception, value, limit or signal, in one line."""

    def __str__(self) -> str:
        return f"{self.reward}: {self.kind}{': ' if self.detail else ''}{self.detail}"


Score = float | RewardFailure
ToolAnswer = str | None | RewardFailure
"""Text of a tool message; None: the turn was the last one."""
Result = float | str | None | RewardFailure
"""Of a reward function or a tool."""


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
