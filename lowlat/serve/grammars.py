"""Grammars: the one compiler of a server, made when the first request needs it.

Owns its thread, apart from those of other work: grammars that take long delay one another alone.
Compiling and its limits are `engine.grammar`'s.
"""

from lowlat.engine.grammar import CompiledGrammar, GrammarCompiler
from lowlat.engine.llm import Model
from lowlat.engine.structured import StructuredOutput
from lowlat.serve.protocol.failure import RequestError
from lowlat.serve.workers import WorkPool
from lowlat.utils.errors import UserError


class Grammars:
    """Compiles structured outputs for `model`; at most `max_waiting` wait for their turn."""

    def __init__(self, model: Model, *, max_waiting: int) -> None:
        self._model = model
        self._worker = WorkPool(threads=1, max_waiting=max_waiting)
        self._compiler: GrammarCompiler | None = None

    async def compile(self, output: StructuredOutput, *, param: str) -> CompiledGrammar:
        """The grammar of `output`. Raises RequestError for the request's field `param`, Overloaded
        where too many wait.
        """
        try:
            return await self._worker.run(self._compile, output)
        except UserError as error:
            raise RequestError(f"{param}: {error}", param=param) from error

    def close(self) -> None:
        """End the thread."""
        self._worker.close()

    def _compile(self, output: StructuredOutput) -> CompiledGrammar:
        # Reads the whole vocabulary, which takes a second for a large one.
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._model.tokenizer, self._model.config.vocab_size)
        return self._compiler.compile(output)
