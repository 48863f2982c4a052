"""What a caller gets back: text with its tokens, log-probabilities and timing.

Owns the step from one completion's tokens to its text (detokenising, stop strings). Generates
nothing itself.
"""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

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
    """Of the prompt, those whose rows the prefix cache held."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens of the prompt that were read, per second."""
        read = self.prompt_tokens - self.cached_tokens
        return read / self.prefill_seconds if self.prefill_seconds > 0.0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first per second; 0 where there is only one."""
        if self.completion_tokens < 2 or self.decode_seconds <= 0.0:
            return 0.0
        return (self.completion_tokens - 1) / self.decode_seconds


class Completion(str):
    """One answer: its text, without end-of-sequence token and without the stop string that ended
    it, and how it came about.
    """

    token_ids: tuple[int, ...]
    """Every generated token, those of a stop string and of the end of sequence included."""
    finish_reason: FinishReason | None
    """None while it is still being generated."""
    logprobs: tuple[TokenLogprob, ...] | None
    """One entry per token, where asked for."""
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
        """The answer as a plain string."""
        return str(self)


class CompletionBuilder:
    """Collects the events of completion `index` of `request`; certain text goes to `pieces`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        index: int,
        *,
        keep_special: frozenset[int] = frozenset(),
    ) -> None:
        """`keep_special`: special tokens whose text is part of the completion's."""
        self.request = request
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.pieces: list[str] = []
        self.error: str | None = None
        """With finish_reason "error": what failed, in one line."""
        self.is_grammar_error = False
        """With an error: whether the form that was asked for is at fault."""
        self._detokenizer = Detokenizer(
            tokenizer, keep_special=keep_special, begins_text=request.options.begins_text
        )
        self._stops = StopStrings(request.params.stop)
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self._num_characters = 0
        """Of all tokens so far."""
        self._num_certain = 0
        """Of `pieces`."""

    def push(self, event: TokenEvent) -> None:
        """Take one event; sets `finish_reason` at the end, also for a stop string found here."""
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
        if piece:
            self.pieces.append(piece)
            self._num_certain += len(piece)

    @property
    def num_in_text(self) -> int:
        """Log-probabilities, of `logprobs` the first, whose tokens begin within the text so far:
        all but those held back, and at the end those of a stop string and of the end of sequence.
        """
        return bisect.bisect_left(self.logprobs, self._num_certain, key=lambda entry: entry.start)

    def result(self) -> Completion:
        """The completion as far as it has come. Raises UserError where it failed."""
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
        """Text held back as the possible start of a character or of a stop string."""
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
    """The text of a completion, piece by piece as it becomes certain; its fields grow along.

    Left early, it must be closed (or leave its `with` block, or be garbage) for its request to end.
    """

    def __init__(
        self, builder: CompletionBuilder, *, step: Callable[[], None], close: Callable[[], None]
    ) -> None:
        self._builder = builder
        self._step = step
        self._close = close
        self._num_shown = 0

    def __next__(self) -> str:
        while self._num_shown == len(self._builder.pieces):
            if self._builder.finish_reason is not None:
                self._builder.result()
                raise StopIteration
            self._step()
        self._num_shown += 1
        return self._builder.pieces[self._num_shown - 1]

    def close(self) -> None:
        """End the request if it has not ended: finish_reason is then "abort"."""
        if self._builder.finish_reason is None:
            self._builder.finish_reason = "abort"
            self._close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def completion(self) -> Completion:
        """Everything so far, as one record."""
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
