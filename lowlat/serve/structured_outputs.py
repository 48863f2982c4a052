"""Grammars: the one compiler of a server, made when the first request needs it.

Owns its thread, apart from those of other work: grammars that take long delay one another alone;
and how much memory the grammars of requests under way may take, together and of one key. Compiling
and the limits of one grammar are `engine.grammar`'s.
"""

import json
import threading
import weakref
from collections import Counter, deque

from lowlat.generate.grammar import CompiledGrammar, GrammarCompiler
from lowlat.generate.model import Model
from lowlat.generate.structured import (
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    Regex,
    StructuredOutput,
)
from lowlat.serve.generation import Overloaded
from lowlat.serve.http.workers import WorkPool
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.structured_outputs import (
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    StructuredOutputs,
)
from lowlat.utils.errors import UserError


def format_output(given: ResponseFormat | None) -> StructuredOutput | None:
    """What response_format asks for; None for text of any form. Raises UserError above a limit."""
    match given:
        case JsonObjectFormat():
            return JsonObject()
        case JsonSchemaFormat():
            return JsonSchema(schema=json.dumps(given.json_schema.schema_))
        case _:
            return None


def structured_output(given: StructuredOutputs) -> StructuredOutput:
    """What structured_outputs asks for. Raises UserError above a limit."""
    if given.json_ is not None:
        return JsonSchema(schema=json.dumps(given.json_))
    if given.regex is not None:
        return Regex(pattern=given.regex)
    if given.choice is not None:
        return Choice(options=tuple(given.choice))
    return Grammar(lark=given.grammar or "")


LEAST_BYTES = 1 << 20
"""What every grammar counts as, at least: it grows while outputs are followed."""
GROWTH = 4
"""Times what a grammar took when it was tried with a few tokens."""


class Grammars:
    """Compiles structured outputs for `model`; at most `max_waiting` wait for their turn.

    What was compiled counts for as long as it is referred to, up to `max_bytes`.
    """

    def __init__(self, model: Model, *, max_waiting: int, max_bytes: int) -> None:
        self._model = model
        self._worker = WorkPool(threads=1, max_waiting=max_waiting)
        self._compiler: GrammarCompiler | None = None
        self._held = HeldBytes(max_bytes)

    async def compile(
        self,
        output: StructuredOutput,
        *,
        param: str,
        cache_namespace: bytes = b"",
        begins_text: bool = True,
    ) -> CompiledGrammar:
        """The grammar of `output`, for the key with `cache_namespace`; `begins_text` as in
        RequestOptions. Raises RequestError for the request's
        field `param`, Overloaded where too many wait or too much is held.
        """
        try:
            return await self._worker.run(self._compile, output, cache_namespace, begins_text)
        except UserError as error:
            raise RequestError(f"{param}: {error}", param=param) from error

    @property
    def held_bytes(self) -> int:
        """What the grammars that are referred to count as."""
        return self._held.total()

    def close(self) -> None:
        """End the thread."""
        self._worker.close()

    def _compile(
        self, output: StructuredOutput, cache_namespace: bytes, begins_text: bool
    ) -> CompiledGrammar:
        self._held.check(cache_namespace, LEAST_BYTES)
        # Reads the whole vocabulary, which takes a second for a large one.
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._model.tokenizer, self._model.config.vocab_size)
        grammar = self._compiler.compile(output, begins_text=begins_text)
        self._held.hold(cache_namespace, grammar, max(LEAST_BYTES, GROWTH * grammar.num_bytes))
        return grammar


class HeldBytes:
    """Bytes that living objects count for, together at most `most`; of one key at most half of it,
    so that no key leaves nothing to the others. Safe to use from several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._by_namespace: Counter[bytes] = Counter()
        # An object may end in any thread, also in one that holds the lock.
        self._ended: deque[tuple[bytes, int]] = deque()

    def check(self, cache_namespace: bytes, size: int) -> None:
        """Raise Overloaded unless there is room for `size` bytes more of the key with
        `cache_namespace`."""
        with self._lock:
            self._settle()
            self._check(cache_namespace, size)

    def hold(self, cache_namespace: bytes, thing: object, size: int) -> None:
        """Count `size` bytes until `thing` ends. Raises Overloaded, counting nothing."""
        with self._lock:
            self._settle()
            self._check(cache_namespace, size)
            self._by_namespace[cache_namespace] += size
        weakref.finalize(thing, self._ended.append, (cache_namespace, size)).atexit = False

    def total(self) -> int:
        """Bytes that count."""
        with self._lock:
            self._settle()
            return self._by_namespace.total()

    def _check(self, cache_namespace: bytes, size: int) -> None:
        own = self._most // 2 if cache_namespace else self._most
        if (
            self._by_namespace[cache_namespace] + size > own
            or self._by_namespace.total() + size > self._most
        ):
            raise Overloaded(retry_after=1)

    def _settle(self) -> None:
        while self._ended:
            cache_namespace, size = self._ended.popleft()
            self._by_namespace[cache_namespace] -= size
            if self._by_namespace[cache_namespace] == 0:
                del self._by_namespace[cache_namespace]
