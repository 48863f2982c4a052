"""Grammars: the one compiler of a server, made when the first request needs it.

Owns that alone: compiling and its limits are `engine.grammar`'s.
"""

import threading

from lowlat.engine.grammar import CompiledGrammar, GrammarCompiler
from lowlat.engine.llm import Model
from lowlat.engine.structured import StructuredOutput
from lowlat.serve.protocol.failure import RequestError
from lowlat.utils.errors import UserError


class Grammars:
    """Compiles structured outputs for `model`; safe to use from several threads."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None

    def compile(self, output: StructuredOutput, *, param: str) -> CompiledGrammar:
        """The grammar of `output`. Raises RequestError for the request's field `param`."""
        try:
            return self._get_compiler().compile(output)
        except UserError as error:
            raise RequestError(f"{param}: {error}", param=param) from error

    def _get_compiler(self) -> GrammarCompiler:
        # It reads the whole vocabulary, which takes a second for a large one.
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    self._model.tokenizer, self._model.config.vocab_size
                )
            return self._compiler
