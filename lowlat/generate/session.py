"""Generation session: drives one engine for text, for the Python API and the HTTP server.

Owns the way from a request to text: one completion builder per completion, token events to the
builders, stop strings, aborts. A failure while text is built ends that request alone. Not
thread-safe: one thread adds, steps and aborts.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowlat.engine.engine import Engine
from lowlat.engine.request import FinishReason, Request, RequestOptions, TokenEvent
from lowlat.generate.completion import CompletionBuilder, CompletionDelta
from lowlat.generate.params import SamplingParams
from lowlat.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of `words`, at the beginning of a text and after a space."""
    texts = [text for word in words for text in (word, f" {word.lstrip()}")]
    encoded = (
        tokenizer.encode(text, add_special_tokens=False, parse_special=False) for text in texts
    )
    return tuple(dict.fromkeys(tuple(ids) for ids in encoded if ids))


@dataclass(slots=True, eq=False)
class TextRequest:
    """A request in the engine and the builders of its completions."""

    request: Request
    builders: tuple[CompletionBuilder, ...]
    """One per completion, in the order of their indices."""
    unfinished: set[int]
    """Indices of the completions whose end has not been delivered."""

    @property
    def is_finished(self) -> bool:
        """Whether all completions have ended."""
        return not self.unfinished


class GenerationSession:
    """Adds requests to an engine, and turns the engine's token events into text."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._requests: dict[int, TextRequest] = {}

    @property
    def requests(self) -> list[TextRequest]:
        """The unfinished requests, in the order they were added."""
        return list(self._requests.values())

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        options: RequestOptions | None = None,
        *,
        keep_special: frozenset[int] = frozenset(),
        begins_text: bool = True,
    ) -> TextRequest:
        """Queue a request; `keep_special` and `begins_text` are CompletionBuilder's.

        A structured output comes compiled, as `options.constraint`. Raises UserError, queuing
        nothing, if the model cannot serve the request.
        """
        options = options or RequestOptions()
        if params.structured is not None and options.constraint is None:
            raise AssertionError("a structured output comes with its compiled grammar")
        if params.bad_words:
            options = replace(options, bad_words=bad_word_ids(self._tokenizer, params.bad_words))
        request = self.engine.add(prompt, params, options)
        try:
            builders = tuple(
                CompletionBuilder(
                    self._tokenizer,
                    request,
                    index,
                    stop=params.stop,
                    keep_special=keep_special,
                    begins_text=begins_text,
                )
                for index in range(params.n)
            )
        except BaseException:
            self.engine.abort(request.id)
            raise
        added = TextRequest(request, builders, set(range(params.n)))
        self._requests[request.id] = added
        return added

    def step(self) -> list[tuple[TextRequest, CompletionDelta]]:
        """Run one step of the engine; what each completion gained."""
        return list(self.deliver(self.engine.step()))

    def deliver(
        self, events: Sequence[TokenEvent]
    ) -> Iterator[tuple[TextRequest, CompletionDelta]]:
        """Add the events of one engine step to their completions; yields what each gained.

        Events of completions that have ended here (stop string, abort) are dropped.
        """
        grouped: dict[tuple[int, int], list[TokenEvent]] = {}
        for event in events:
            grouped.setdefault((event.request_id, event.index), []).append(event)
        for (request_id, index), own in grouped.items():
            request = self._requests.get(request_id)
            if request is not None and index in request.unfinished:
                yield from self._advance(request, index, own)

    def abort(
        self, request: TextRequest, reason: FinishReason = "abort", error: str | None = None
    ) -> list[CompletionDelta]:
        """End all unfinished completions of a request and release its pages; returns their ends.
        No effect on a finished request."""
        self.engine.abort(request.request.id, reason)
        return self.end(request, reason, error)

    def end(
        self, request: TextRequest, reason: FinishReason, error: str | None = None
    ) -> list[CompletionDelta]:
        """Forget a request without calling the engine; returns the ends of its unfinished
        completions."""
        self._requests.pop(request.request.id, None)
        indices = sorted(request.unfinished)
        request.unfinished.clear()
        for index in indices:
            request.builders[index].fail(reason, error)
        return [end_delta(index, reason, error) for index in indices]

    def _advance(
        self, request: TextRequest, index: int, events: list[TokenEvent]
    ) -> Iterator[tuple[TextRequest, CompletionDelta]]:
        """One completion's events of a step, as one delta."""
        builder = request.builders[index]
        try:
            for event in events:
                if builder.finish_reason is None:
                    builder.push(event)
            delta = builder.take_delta()
        except Exception as error:
            logger.exception("detokenizing failed for request %d", request.request.id)
            for end in self.abort(request, "error", f"detokenizing failed: {error}"):
                yield request, end
            return
        if builder.finish_reason is not None:
            self.engine.stop(request.request.id, index)
            request.unfinished.remove(index)
            if request.is_finished:
                del self._requests[request.request.id]
        yield request, delta


def end_delta(index: int, reason: FinishReason, error: str | None) -> CompletionDelta:
    """The delta that ends a completion without a token."""
    return CompletionDelta(
        index=index, text="", tokens=(), logprobs=(), finish_reason=reason, error=error
    )
