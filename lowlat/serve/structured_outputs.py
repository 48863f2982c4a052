"""Structured outputs of a server: grammar compilation in threads of its own, with a memory budget.

Slow grammars delay only other grammars, and those of other API keys least. The budget covers the
grammars of all active requests and limits each API key to half of it. Compilation itself is in
`generate.grammar`.
"""

import threading
import weakref
from collections import Counter, deque

from lowlat.generate.grammar import CompiledGrammar, GrammarCompiler
from lowlat.generate.model import Model
from lowlat.generate.structured import StructuredOutput
from lowlat.ops.native import processors
from lowlat.serve.generation import Overloaded
from lowlat.serve.http.workers import FairWorkerPool
from lowlat.serve.protocol.errors import about

MAX_PARALLEL = 4
"""Most grammars of one API key that compile at once; each has a process with the vocabulary."""
MIN_GRAMMAR_BYTES = 1 << 20
"""Least memory to count for a grammar: its automaton grows while outputs are matched."""
GROWTH_FACTOR = 4
"""Memory to count for a grammar, as a multiple of its size after a trial with a few tokens."""


class StructuredOutputManager:
    """Compiles grammars for `model`, one per processor at once; at most `max_waiting` wait.

    A compiled grammar counts towards `budget` for as long as it is referenced.
    """

    def __init__(self, model: Model, *, max_waiting: int, budget: "MemoryBudget") -> None:
        self._model = model
        # One more thread than processors: an API key that uses all of these leaves it free.
        threads = 1 + min(MAX_PARALLEL, processors())
        self._workers = FairWorkerPool(threads=threads, max_waiting=max_waiting)
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None
        self._held = budget

    async def compile(
        self,
        output: StructuredOutput,
        *,
        param: str,
        owner: str = "",
        cache_namespace: bytes = b"",
        begins_text: bool = True,
    ) -> CompiledGrammar:
        """Compile `output` to a grammar, fairly between owners; `begins_text` as in RequestOptions.

        Raises RequestError about the field `param`, Overloaded if the queue or the memory budget
        (per `cache_namespace` or in total) is full.
        """
        with about(param):
            return await self._workers.run(
                owner, self._compile, output, cache_namespace, begins_text
            )

    @property
    def used_bytes(self) -> int:
        """Counted memory of the grammars in use."""
        return self._held.total()

    def close(self) -> None:
        self._workers.close()

    def _compile(
        self, output: StructuredOutput, cache_namespace: bytes, begins_text: bool
    ) -> CompiledGrammar:
        self._held.check(cache_namespace, MIN_GRAMMAR_BYTES)
        grammar = self._get_compiler().compile(output, begins_text=begins_text)
        self._held.hold(
            cache_namespace, grammar, max(MIN_GRAMMAR_BYTES, GROWTH_FACTOR * grammar.num_bytes)
        )
        return grammar

    def _get_compiler(self) -> GrammarCompiler:
        """Created on first use: it reads the whole vocabulary, which takes up to a second."""
        with self._lock:
            if self._compiler is None:
                model = self._model
                self._compiler = GrammarCompiler(model.tokenizer, model.config.vocab_size)
            return self._compiler


class MemoryBudget:
    """Limits the bytes counted for live objects to `most`, and to half of it per cache namespace.

    So no API key can exhaust the budget of the others. Thread-safe.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._by_namespace: Counter[bytes] = Counter()
        # An object may be finalized in any thread, also in one that holds the lock.
        self._ended: deque[tuple[bytes, int]] = deque()

    def check(self, cache_namespace: bytes, size: int) -> None:
        """Raise Overloaded unless `size` more bytes of `cache_namespace` fit the budget."""
        with self._lock:
            self._settle()
            self._check(cache_namespace, size)

    def hold(self, cache_namespace: bytes, thing: object, size: int) -> None:
        """Count `size` bytes while `thing` is alive. Raises Overloaded if over budget."""
        with self._lock:
            self._settle()
            self._check(cache_namespace, size)
            self._by_namespace[cache_namespace] += size
        weakref.finalize(thing, self._ended.append, (cache_namespace, size)).atexit = False

    def total(self) -> int:
        """Bytes counted now."""
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
