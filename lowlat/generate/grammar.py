"""Guided decoding (structured outputs): grammar compiler, grammar states and token bitmasks.

llguidance computes the masks. Owns the two steps of compiling (a trial in a process that can be
killed, then in this one) and each output's state in its grammar. `generate.structured` defines the
kinds of output, `engine.sampler` applies masks to logits.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import llguidance
import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from lowlat.engine.constraint import Constraint, ConstraintState
from lowlat.generate.grammar_source import FIELDS, grammar_source
from lowlat.generate.grammar_worker import (
    CPU_SECONDS,
    MEMORY_BYTES,
    STACK_BYTES,
    make_matcher,
    make_tokenizer,
)
from lowlat.generate.structured import StructuredOutput
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from lowlat.utils.worker import START_SECONDS, LineWorker

WORKER = Path(__file__).with_name("grammar_worker.py")
TRIAL_SECONDS = 5.0
"""Wall-clock limit of a trial; the worker itself ends after CPU_SECONDS of processor time."""
MAX_KNOWN = 1024
"""Maximum number of cached results of trials."""
BYTES_PER_CHARACTER = 64
"""Estimated memory per character of a grammar, if it cannot be measured."""
MASK_SECONDS = 1.0
MASK_SECONDS_PER_TOKEN = 0.01
"""Processor time that one output may spend on masks: MASK_SECONDS, and this much per token."""


class GrammarError(UserError):
    """A grammar limit or error during one output; it ends this output only."""


class GrammarCompiler:
    """Compiles structured outputs for one tokenizer; safe to use from several threads.

    vocab_size: width of the logits; ids without a token of the tokenizer are never allowed. The
    first `compile` starts a process, which takes some tenths of a second.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._strips_leading_space = tokenizer.strips_leading_space
        tokens = [tokenizer.id_to_bytes(index) for index in range(vocab_size)]
        eos = sorted(index for index in tokenizer.eos_ids if index < vocab_size)
        self._ends = frozenset(eos)
        if not eos:
            # llguidance needs an end-of-sequence id. No logit has this one; outputs end by is_done.
            eos = [vocab_size]
            tokens.append(b"")
        special = sorted(i for i in tokenizer.special_ids | set(eos) if i < len(tokens))
        self._is_token = torch.tensor([bool(token) for token in tokens[:vocab_size]])
        self._vocabulary = {"tokens": [t.hex() for t in tokens], "special": special, "eos": eos}
        self._tokenizer = make_tokenizer(tokens, special, eos)
        self._lock = threading.Lock()
        self._idle_workers: list[LineWorker] = []
        self._known: dict[bytes, int] = {}

    def compile(self, output: StructuredOutput, *, begins_text: bool = True) -> "CompiledGrammar":
        """The compiled grammar of `output`; begins_text: see CompletionBuilder.

        Takes at most TRIAL_SECONDS. Each thread's trial has a process of its own, which later
        trials use again.
        Raises UserError naming json_object, json_schema, regex, choice or grammar and what is wrong
        with it.
        """
        field = FIELDS[type(output)]
        strips = begins_text and self._strips_leading_space
        source = grammar_source(output, strips_leading_space=strips)
        size = self._try(source, field)
        matcher = make_matcher(self._tokenizer, source)
        if matcher.is_error():
            raise _error(field, matcher.get_error())
        return CompiledGrammar(matcher, field, self._is_token, self._ends, size)

    def _try(self, source: str, field: str) -> int:
        """Bytes of memory that the compiled `source` takes. Raises UserError unless it compiles in
        the worker, within its limits."""
        digest = hashlib.sha256(source.encode()).digest()
        if (size := self._known.get(digest)) is not None:
            return size
        with self._worker() as worker:
            reply = worker.ask(json.dumps(source), TRIAL_SECONDS)
        if reply is None:
            raise UserError(
                f"{field}: too complex (compiling it takes more than {CPU_SECONDS} s, "
                f"{MEMORY_BYTES >> 20} MiB or {STACK_BYTES >> 20} MiB of stack); simplify it"
            )
        message, size = json.loads(reply)
        if message:
            raise _error(field, message)
        size = size or BYTES_PER_CHARACTER * len(source)
        with self._lock:
            if len(self._known) == MAX_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[digest] = size
        return size

    @contextlib.contextmanager
    def _worker(self) -> Iterator[LineWorker]:
        """A worker process for one trial: an idle one, or a new one."""
        with self._lock:
            worker = self._idle_workers.pop() if self._idle_workers else None
        if worker is None or not worker.is_alive():
            worker = LineWorker(WORKER)
            if worker.ask(json.dumps(self._vocabulary), START_SECONDS) is None:
                raise RuntimeError("the process that tries grammars did not start")
        yield worker
        if worker.is_alive():
            with self._lock:
                self._idle_workers.append(worker)


class CompiledGrammar(Constraint):
    """A compiled grammar that starts outputs; safe to use from several threads.

    Its outputs share its tables and limits, so each request compiles its own grammar.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        field: str,
        is_token: Bool[Tensor, " vocab"],
        ends: frozenset[int],
        num_bytes: int,
    ) -> None:
        self.num_bytes = num_bytes
        """Memory it took in its trial, with a few outputs started."""
        self._matcher = matcher
        self.field = field
        self.is_token = is_token
        self.ends = ends

    def start(self) -> "GrammarState":
        return GrammarState(self._matcher.deep_copy(), self)

    def error(self, message: str) -> GrammarError:
        return GrammarError(str(_error(self.field, message)))


class GrammarState(ConstraintState):
    """One output's state in its grammar; for one thread at a time.

    `mask` and `accept` raise GrammarError when the grammar's work exceeds a limit.
    """

    def __init__(self, matcher: llguidance.LLMatcher, grammar: CompiledGrammar) -> None:
        self._matcher = matcher
        self._grammar = grammar
        self._seconds_left = MASK_SECONDS

    def mask(self) -> Bool[Tensor, " vocab"]:
        """Token bitmask of the grammar's state: the tokens that may come next."""
        start = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._seconds_left -= time.thread_time() - start
        if self._matcher.is_error():
            raise self._grammar.error(self._matcher.get_error())
        if self._seconds_left < 0:
            raise self._grammar.error("its masks take too long")
        flags = np.unpackbits(bits, count=len(self._grammar.is_token), bitorder="little")
        return torch.from_numpy(flags).view(torch.bool) & self._grammar.is_token

    def accept(self, token: int) -> None:
        """Advance by `token`; after the end, another end-of-sequence id has no effect.

        Raises GrammarError if `token` is not allowed; the state does not change then.
        """
        if self.is_done and token in self._grammar.ends:
            return
        if not 0 <= token < len(self._grammar.is_token):
            raise GrammarError(f"{self._grammar.field}: token {token} is no token of the model")
        start = time.thread_time()
        accepted = self._matcher.try_consume_tokens([token])
        self._seconds_left += MASK_SECONDS_PER_TOKEN - (time.thread_time() - start)
        if self._matcher.is_error():
            raise self._grammar.error(self._matcher.get_error())
        if accepted != 1:
            # try_consume_tokens reports no reason; consume_token reports a reached limit.
            copy = self._matcher.deep_copy()
            copy.consume_token(token)
            raise self._grammar.error(f"token {token} is not allowed: {copy.get_error()}")

    @property
    def is_done(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()


def _error(field: str, message: str) -> UserError:
    """llguidance's `message` in one line, without its source excerpt."""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines()]
    reasons = [line for line in lines if line.startswith("error: ")]
    text = " ".join([lines[0][:200], *reasons]) if lines else "failed"
    if "NoExtensionBias" in text:
        return UserError(f"{field}: no text satisfies it; allow more")
    if "coerce_one_of" in text:
        what = "alternatives of oneOf may overlap"
        return UserError(f"{field}: {what}; use anyOf, or const to tell them apart")
    return UserError(f"{field}: {text[:400]}; simplify or correct it")
