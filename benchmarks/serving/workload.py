"""Benchmark workload: token-id prompts and fixed output lengths, reproducible by seed.

Lengths are log-uniform: most requests are short and a few are long, like those of users.
"""

import math
import random
import re
from dataclasses import dataclass

from lowlat.utils.errors import UserError

LOWEST_ID = 3
"""Smallest token id in prompts: lower ids are special tokens in many vocabularies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Lengths from `low` to `high` tokens."""

    low: int
    high: int

    def draw(self, stream: random.Random) -> int:
        """A length, log-uniform."""
        value = math.exp(stream.uniform(math.log(self.low), math.log(self.high + 1)))
        return min(int(value), self.high)

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One request."""

    prompt: tuple[int, ...]
    output: int
    """Number of output tokens."""


def parse_span(option: str, text: str) -> Span:
    """`"32:1024"` or `"64"` -> Span. Raises UserError naming the option."""
    match = re.fullmatch(r"([0-9]{1,7})(?::([0-9]{1,7}))?", text)
    if match is None:
        raise UserError(f"{option} '{text}': give LENGTH or LOWEST:HIGHEST, such as 32:1024")
    low, high = int(match[1]), int(match[2] or match[1])
    if not 1 <= low <= high:
        raise UserError(f"{option} '{text}': the lowest must be from 1 to the highest")
    return Span(low=low, high=high)


def draw_work(
    count: int, *, prompt: Span, output: Span, shared: int, vocab_size: int, seed: int
) -> list[Work]:
    """`count` requests whose prompts begin with the same `shared` tokens."""
    stream = random.Random(seed)
    ids = range(min(LOWEST_ID, vocab_size - 1), vocab_size)
    beginning = stream.choices(ids, k=shared)
    work = []
    for _ in range(count):
        length, tokens = prompt.draw(stream), output.draw(stream)
        own = stream.choices(ids, k=max(1, length - shared))
        work.append(Work(prompt=tuple(beginning + own), output=tokens))
    return work
