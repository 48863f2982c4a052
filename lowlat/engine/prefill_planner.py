"""Prefill planner: chunked prefill, and the attention path of each token's KV cache entry.

Owns the rule that makes entries reproducible: the path of an entry follows from its position and
from the length of its request's prompt, never from the batch composition. A prompt is divided by a
fixed grid of chunks, each on the path that suits its length; generated tokens take the decode path.
"""

from functools import cache, partial

from lowlat.attention.path import AttentionPath, choose_path
from lowlat.config.attention import ModelAttention

PREFILL_CHUNK = 2048
"""Tokens of a prefill chunk. On the expanded path each chunk rebuilds the keys and values of all
entries before it. At 8,192 tokens this takes a fifth of all multiply-adds with chunks of 1,024, a
tenth with 2,048."""


class PrefillPlanner:
    """Divides prompts into chunks of `chunk` tokens, rounded up to whole pages of `page_size`, so
    that no page of a prompt has two attention paths."""

    def __init__(self, attention: ModelAttention, *, chunk: int, page_size: int) -> None:
        assert chunk > 0, chunk
        self.chunk = -(-chunk // page_size) * page_size
        self.page_size = page_size
        self._choose_path = cache(partial(choose_path, attention))

    def path(self, position: int, prompt_length: int) -> AttentionPath:
        """The path of the KV cache entry at `position` of a sequence with a prompt of
        `prompt_length` tokens."""
        if position >= prompt_length:
            return "decode"
        start = position - position % self.chunk
        return self._choose_path(min(self.chunk, prompt_length - start))

    def next_chunk(
        self, start: int, prompt_length: int, length: int, limit: int
    ) -> tuple[int, AttentionPath]:
        """Length and attention path of the chunk after `start` cached tokens of a sequence of
        `length` tokens, at most `limit` tokens long."""
        end = length
        if start < prompt_length:
            end = min(start - start % self.chunk + self.chunk, prompt_length)
        return min(end - start, limit), self.path(start, prompt_length)

    def page_path(self, page: int, prompt_length: int) -> str:
        """Name of the path or paths that compute a sequence's page number `page` (from 0). Entries
        of equal token prefixes are bit-equal if these names agree for all pages so far.
        """
        start = page * self.page_size
        of_prompt = prompt_length - start
        path = self.path(start, prompt_length)
        if path != "decode" and of_prompt < self.page_size:
            # The rest of the page is generated tokens, on the decode path.
            return f"{path} {of_prompt}"
        return path
