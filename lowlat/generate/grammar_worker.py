"""Worker process for trial compilation of grammars: one grammar per input line; its error and
memory per output line.

`generate.grammar` runs it as a script and kills it when a grammar takes too long; it also calls the
functions here, so that both processes compile the same way. Imports nothing of the package, so that
it starts in a few hundredths of a second.

llguidance limits its own work, but not everywhere: intersections of patterns can take minutes and
gigabytes, and long chains of rules overflow the stack. A grammar that passes here, with less memory
and stack than the caller has, is safe to compile there.
"""

import ctypes
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import llguidance

MEMORY_BYTES = 64 << 20
"""Besides the memory of the tokens. The caller holds a compiled grammar per unfinished request."""
STACK_BYTES = 1 << 20
CPU_SECONDS = 2
"""Processor time per grammar, in whole seconds."""
TRIAL_OUTPUTS = 4
TRIAL_TOKENS = 8
"""A trial starts TRIAL_OUTPUTS outputs of TRIAL_TOKENS tokens each."""

LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
}
"""llguidance's own limits: at worst about 0.1 s per mask and 50 MB per output."""


class Vocabulary:
    """The vocabulary in llguidance's tokenizer interface."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], eos: Sequence[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos[0]

    def __call__(self, text: str) -> list[int]:
        # Called only to force tokenizations, which every grammar turns off.
        raise NotImplementedError


def make_tokenizer(
    tokens: Sequence[bytes], special: Sequence[int], eos: Sequence[int]
) -> llguidance.LLTokenizer:
    """llguidance's index of `tokens`; an empty one stands for an id that is never allowed."""
    vocabulary = Vocabulary(tokens, special, eos)
    return llguidance.LLTokenizer(vocabulary, eos_token=list(eos))  # type: ignore[arg-type]


def make_matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher at the start of an output; ask it for is_error() before use."""
    limits = llguidance.LLParserLimits(**LIMITS, verbose_errors=False)  # type: ignore[arg-type]
    return llguidance.LLMatcher(tokenizer, grammar, limits=limits, log_level=0)


def trial(tokenizer: llguidance.LLTokenizer, grammar: str) -> tuple[str, int]:
    """Compile `grammar` and start some outputs; returns the error, or "", and the bytes that all of
    these take. The outputs are the same every time, so a grammar is refused always or never.
    """
    before = used_bytes()
    start = make_matcher(tokenizer, grammar)
    outputs = [start.deep_copy() for _ in range(TRIAL_OUTPUTS)]
    rng = random.Random(0)
    for matcher in outputs:
        for _ in range(TRIAL_TOKENS):
            if matcher.is_error() or matcher.is_stopped():
                break
            token = _draw(matcher.compute_bitmask(), tokenizer.eos_tokens, rng)
            if matcher.is_error() or token is None:
                break
            matcher.consume_token(token)
        if matcher.is_error():
            return matcher.get_error() or "failed", 0
    return "", max(0, used_bytes() - before)


def _draw(bits: bytes, ends: Sequence[int], rng: random.Random) -> int | None:
    """A token whose bit is set and that is no end-of-sequence id; None if there is none."""
    masked = bytearray(bits)
    for end in ends:
        masked[end // 8] &= ~(1 << end % 8)
    start = rng.randrange(len(masked))
    # Stripping the zeros is quick, where a loop over the bits takes longer than the mask itself.
    rest = masked[start:].lstrip(b"\0") or masked.lstrip(b"\0")
    if not rest:
        return None
    first = len(masked) - len(rest)
    chosen = rng.choice([bit for bit in range(8) if rest[0] >> bit & 1])
    return 8 * first + chosen


class AllocatorFigures(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks used free top".split()
    ]


def used_bytes() -> int:
    """Bytes allocated in this process; 0 if the C library does not report them."""
    try:
        figures = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return 0
    figures.restype = AllocatorFigures
    found = figures()
    return found.used + found.hblkhd


def limit_memory() -> None:
    """Limit the process to MEMORY_BYTES more than it has, on Linux."""
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu() -> None:
    """Let this grammar use CPU_SECONDS more, on Linux; then the system ends the process."""
    if sys.platform == "linux":
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU_SECONDS, resource.RLIM_INFINITY))


def with_small_stack(work: Callable[[], None]) -> None:
    """Run `work` in a thread with a smaller stack than the threads that compile grammars have."""
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def answer_all() -> None:
    """Read the vocabulary, then try one grammar per line until standard input closes."""
    vocabulary = json.loads(sys.stdin.readline())
    tokens = [bytes.fromhex(token) for token in vocabulary["tokens"]]
    tokenizer = make_tokenizer(tokens, vocabulary["special"], vocabulary["eos"])
    limit_memory()
    # llguidance writes panics and failed allocations to stderr, in many lines; the caller reports
    # one line.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        limit_cpu()
        print(json.dumps(trial(tokenizer, json.loads(line))), flush=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent, which closes our input
    print("ready", flush=True)
    with_small_stack(answer_all)


if __name__ == "__main__":
    main()
