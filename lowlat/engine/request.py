"""What is being generated: a Request per prompt, a Sequence per completion, an TokenEvent per
token.

Owns the records and their states, no decisions: `engine.scheduler` chooses who runs,
`engine.engine` moves states.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

from lowlat.attention.path import AttentionPath
from lowlat.engine.constraint import Constraint
from lowlat.engine.params import SamplingParams
from lowlat.engine.sampler import SequenceSampler

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]
"""stop: end-of-sequence token or stop string; length: max_tokens or context reached; abort: the
caller gave up; deadline: its time was over; error: the model, the sampler or the grammar failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOptions:
    """What a request asks of the engine besides its tokens."""

    priority: int = 0
    """Lower values go first: see Scheduler."""
    deadline: float | None = None
    """Clock (time.perf_counter) in seconds at which what is unfinished ends."""
    cache_namespace: bytes = b""
    """Whose request it is: rows of the prefix cache are shared, and service is divided fairly,
    among requests of one cache_namespace and never across."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end a completion besides the model's own."""
    grammar: Constraint | None = None
    """What the output must look like."""
    begins_text: bool = True
    """Whether the output is a text of its own, which a tokenizer may drop a first space of, and not
    the rest of the prompt's."""
    is_offline: bool = False
    """Whether nobody waits for its tokens one by one: prompts are not read in smaller pieces for
    the sake of its decoding."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One completion: waiting (no pages), running, or finished (a `finish_reason`, no pages)."""

    request: "Request"
    index: int
    """Which of the request's n completions."""
    tokens: list[int]
    """Prompt and output."""
    sampler: SequenceSampler
    num_cached: int = 0
    """Leading tokens whose rows are in the cache."""
    pages: list[int] = field(default_factory=list)
    """Pages of the cache in order; they cover at least num_cached rows."""
    num_indexed: int = 0
    """Leading pages the prefix cache has been told of."""
    draft_tokens: list[int] = field(default_factory=list)
    """Guesses at the next tokens, to be verified with the next step."""
    was_preempted: bool = False
    """Whether it has lost its pages after it ran."""
    finish_reason: FinishReason | None = None
    first_token_at: float | None = None
    """Clock in seconds when the first token was chosen."""
    last_token_at: float | None = None
    """Clock in seconds when the latest token was chosen."""

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_pending(self) -> int:
        """Tokens the model has yet to read; 1 while decoding."""
        return len(self.tokens) - self.num_cached

    @property
    def awaits_first_token(self) -> bool:
        """Whether its first token is still to come."""
        return self.num_outputs == 0

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens are read that are known already: a prompt, or everything again after a
        preemption."""
        return self.awaits_first_token or self.num_pending > 1


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and how to complete it n times."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    options: RequestOptions
    max_outputs: int
    """Tokens after which a completion ends: max_tokens, or what the context leaves."""
    arrived_at: float
    """Clock in seconds when it was queued."""
    sequences: list[Sequence] = field(default_factory=list)
    """Completion 0 alone until the prompt is cached, then all n, which share the prompt's pages."""
    started_at: float | None = None
    """Clock in seconds when the first step of the prompt began."""
    num_matched: int = 0
    """Tokens of the prompt that the prefix cache held when it started: others had read them."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token of one completion, or its end."""

    request_id: int
    index: int
    token: int | None
    """The chosen token; None where a completion ends without one."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    is_text: bool = True
    """False for a token that only says that the completion ends."""
    error: str | None = None
    """With finish_reason "error": what failed, in one line."""
    is_grammar_error: bool = False
    """With an error: whether the path that was asked for is at fault, and nothing of ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Part of a step: consecutive tokens of one sequence for the model to read."""

    tokens: SequenceOf[int]
    start: int
    """Position of the first of them: rows cached before."""
    pages: tuple[int, ...]
    """Pages of the sequence, covering start + len(tokens) rows."""
    num_logits: int
    """Logits are wanted for this many of the last tokens."""
    path: AttentionPath
    """The arithmetic that computes their rows."""
