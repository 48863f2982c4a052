"""Completions: text with its tokens, log-probabilities and timing, built from token events.

Owns the step from one completion's tokens to its text (detokenizing, stop strings). Generates
nothing itself.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lowlat.engine.request import FinishReason, Request, TokenEvent
from lowlat.text.detokenize import Detokenizer
from lowlat.text.stops import StopStrings
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probabilities under the model: of a generated token, of the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), best first."""
    start: int = 0
    """Characters of the text before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens and seconds of one completion."""

    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    """From the prompt's first step to the first token."""
    decode_seconds: float
    """From the first token to the last."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed (not found in the prefix cache) per second."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds > 0.0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first per second; 0 where there is only one."""
        if self.completion_tokens < 2 or self.decode_seconds <= 0.0:
            return 0.0
        return (self.completion_tokens - 1) / self.decode_seconds


class Completion(str):
    """One completion: a str without the end-of-sequence token and the stop string that ended it,
    with tokens, finish reason, log-probabilities and usage. Empty for a model without a tokenizer.
    """

    token_ids: tuple[int, ...]
    """Every generated token, those of a stop string and of the end of sequence included."""
    finish_reason: FinishReason | None
    """None while it is still being generated."""
    logprobs: tuple[TokenLogprob, ...] | None
    """One entry per token; None unless requested."""
    usage: Usage

    def __new__(
        cls,
        text: str,
        *,
        token_ids: tuple[int, ...],
        finish_reason: FinishReason | None,
        logprobs: tuple[TokenLogprob, ...] | None,
        usage: Usage,
    ) -> "Completion":
        self = super().__new__(cls, text)
        self.token_ids = token_ids
        self.finish_reason = finish_reason
        self.logprobs = logprobs
        self.usage = usage
        return self

    @property
    def text(self) -> str:
        """The text as a plain string."""
        return str(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionDelta:
    """What one completion gained in one step."""

    index: int
    """Which of the request's n completions."""
    text: str
    """Final text: whole characters, without the stop string that ended it."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    """If requested, one per token that begins within the text so far and was not in an earlier
    delta."""
    finish_reason: FinishReason | None
    error: str | None
    """With finish_reason "error": what failed, in one line."""
    is_grammar_error: bool = False
    """With an error: whether the requested grammar caused it, not the server."""
    stop_string: str | None = None
    """With finish_reason "stop": the stop string that ended the completion, if one did."""
    embedding: tuple[float, ...] | None = None
    """With pooling: the pooled hidden states of the prompt."""


class CompletionBuilder:
    """Collects the events of completion `index` of `request`; final text goes to `pieces`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        index: int,
        *,
        stop: Sequence[str] = (),
        keep_special: frozenset[int] = frozenset(),
        begins_text: bool = True,
    ) -> None:
        """stop: strings that end the completion. keep_special: special tokens whose text is part of
        the completion. begins_text: whether the output is a text of its own, whose leading space a
        tokenizer may drop, and does not continue text of the prompt.
        """
        self.request = request
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.pieces: list[str] = []
        self.error: str | None = None
        """With finish_reason "error": what failed, in one line."""
        self.is_grammar_error = False
        """With an error: whether the requested grammar caused it."""
        self.embedding: tuple[float, ...] | None = None
        """With pooling: the pooled hidden states of the prompt."""
        self._detokenizer = Detokenizer(
            tokenizer, keep_special=keep_special, begins_text=begins_text
        )
        if stop:
            tokenizer.require()
        self._stops = StopStrings(stop)
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self._num_characters = 0
        """Of all tokens so far."""
        self._num_final = 0
        """Characters of `pieces`."""
        self._num_taken = (0, 0, 0)
        """Pieces, tokens and log-probabilities that earlier deltas hold."""

    def push(self, event: TokenEvent) -> None:
        """Add one event. Sets `finish_reason` at the end, also for a stop string in the text."""
        piece = ""
        if event.token is not None:
            self.token_ids.append(event.token)
            if event.logprob is not None:
                start = self._num_characters
                self.logprobs.append(TokenLogprob(event.token, event.logprob, event.top, start))
            if event.is_text:
                text = self._detokenizer.push(event.token)
                self._num_characters += len(text)
                piece = self._push_text(text)
        if self.finish_reason is None and event.finish_reason is not None:
            piece += self._flush()
            self.finish_reason = self.finish_reason or event.finish_reason
            self.error, self.is_grammar_error = event.error, event.is_grammar_error
            self.embedding = event.embedding
        if piece:
            self.pieces.append(piece)
            self._num_final += len(piece)

    @property
    def num_in_text(self) -> int:
        """Number of leading `logprobs` whose tokens begin within the text so far. Excludes tokens
        of held-back text and, at the end, of a stop string or the end of sequence.
        """
        return bisect.bisect_left(self.logprobs, self._num_final, key=lambda entry: entry.start)

    def fail(self, reason: FinishReason, error: str | None = None) -> None:
        """End the completion without a token."""
        self.finish_reason, self.error = reason, error

    def take_delta(self) -> CompletionDelta:
        """What was added since the last call."""
        pieces, tokens, logprobs = self._num_taken
        num_in_text = self.num_in_text
        self._num_taken = len(self.pieces), len(self.token_ids), num_in_text
        return CompletionDelta(
            index=self.index,
            text="".join(self.pieces[pieces:]),
            tokens=tuple(self.token_ids[tokens:]),
            logprobs=tuple(self.logprobs[logprobs:num_in_text]),
            finish_reason=self.finish_reason,
            error=self.error,
            is_grammar_error=self.is_grammar_error,
            stop_string=self._stops.matched,
            embedding=self.embedding,
        )

    def result(self) -> Completion:
        """The completion so far. Raises UserError if it failed."""
        if self.finish_reason == "error":
            raise UserError(self.error or "the completion failed")
        return Completion(
            "".join(self.pieces),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            logprobs=None if self.request.params.logprobs is None else tuple(self.logprobs),
            usage=self.usage,
        )

    def _push_text(self, text: str) -> str:
        safe, stopped = self._stops.push(text)
        if stopped:
            self.finish_reason = "stop"
        return safe

    def _flush(self) -> str:
        """Text held back as the possible beginning of a character or of a stop string."""
        text = self._push_text(self._detokenizer.flush())
        return text if self.finish_reason == "stop" else text + self._stops.flush()

    @property
    def usage(self) -> Usage:
        """Tokens and seconds so far."""
        sequences = self.request.sequences
        sequence = sequences[self.index] if self.index < len(sequences) else None
        started = self.request.started_at
        first = None if sequence is None else sequence.first_token_at
        last = None if sequence is None else sequence.last_token_at
        return Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=len(self.token_ids),
            prefill_seconds=0.0 if started is None or first is None else first - started,
            decode_seconds=0.0 if first is None or last is None else last - first,
            cached_tokens=self.request.num_matched,
        )


class Stream(Iterator[str]):
    """Iterator over the text of a completion as it is generated; its fields grow with it.

    If iteration stops early, close the stream (its `with` block and garbage collection do so too)
    to end its request.
    """

    def __init__(
        self, builder: CompletionBuilder, *, step: Callable[[], None], close: Callable[[], object]
    ) -> None:
        self._builder = builder
        self._step = step
        self._close = close
        self._num_yielded = 0

    def __next__(self) -> str:
        while self._num_yielded == len(self._builder.pieces):
            if self._builder.finish_reason is not None:
                self._builder.result()
                raise StopIteration
            self._step()
        self._num_yielded += 1
        return self._builder.pieces[self._num_yielded - 1]

    def close(self) -> None:
        """End the request if it has not ended: finish_reason is then "abort"."""
        if self._builder.finish_reason is None:
            self._close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def completion(self) -> Completion:
        """Everything so far as one Completion."""
        return self._builder.result()

    @property
    def text(self) -> str:
        return self.completion.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completion.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._builder.finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.completion.logprobs

    @property
    def usage(self) -> Usage:
        return self.completion.usage
