"""Prefill planner: chunked prefill, and the attention path of each token's KV cache entry.

Owns the rule that makes entries reproducible: the path of an entry follows from its position and
from the length of its request's prompt, never from the batch composition. A prompt is divided by a
fixed grid of chunks, each on the path that suits its length; generated tokens take the decode path.
The few tokens on the last page of a long prompt are a chunk of their own: a request that finds all
pages before it in a cache computes them without rebuilding the keys and values of the whole prompt.
"""

from functools import cache, partial

from lowlat.attention.path import AttentionPath, choose_path
from lowlat.config.attention import GQAConfig, ModelAttention, distinct

PREFILL_CHUNK = 2048
"""Tokens of a prefill chunk. On the expanded path each chunk rebuilds the keys and values of all
entries before it. At 8,192 tokens this takes a fifth of all multiply-adds with chunks of 1,024, a
tenth with 2,048."""

TOKENS_PER_TAIL_TOKEN = 512
"""A prompt's tokens for each token of a chunk on its last page. Without cached pages, this chunk
adds at most 1 % to the prompt's time (medians at 2,116, 4,104 and 8,208 tokens; DeepSeek-V3 at a
quarter of its width, Zen 4)."""


class PrefillPlanner:
    """Divides prompts into chunks of `chunk` tokens, rounded up to whole pages of `page_size`, so
    that no page of a prompt has two attention paths."""

    def __init__(self, attention: ModelAttention, *, chunk: int, page_size: int) -> None:
        assert chunk > 0, chunk
        self.chunk = -(-chunk // page_size) * page_size
        self.page_size = page_size
        self._choose_path = cache(partial(choose_path, attention))
        self._rebuilds_keys = any(not isinstance(each, GQAConfig) for each in distinct(attention))

    def path(self, position: int, prompt_length: int) -> AttentionPath:
        """The path of the KV cache entry at `position` of a sequence with a prompt of
        `prompt_length` tokens."""
        if position >= prompt_length:
            return "decode"
        start, end = self._chunk_of(position, prompt_length)
        return self._choose_path(end - start)

    def next_chunk(
        self, start: int, prompt_length: int, length: int, limit: int
    ) -> tuple[int, AttentionPath]:
        """Length and attention path of the chunk after `start` cached tokens of a sequence of
        `length` tokens, at most `limit` tokens long."""
        end = length
        if start < prompt_length:
            _, end = self._chunk_of(start, prompt_length)
        return min(end - start, limit), self.path(start, prompt_length)

    def _chunk_of(self, position: int, prompt_length: int) -> tuple[int, int]:
        """(start, end) of the prompt's chunk with `position`."""
        start = position - position % self.chunk
        end = min(start + self.chunk, prompt_length)
        last_page = prompt_length - 1 - (prompt_length - 1) % self.page_size
        if end == prompt_length and self._cuts(start, last_page, end):
            return (last_page, end) if position >= last_page else (start, last_page)
        return start, end

    def _cuts(self, start: int, last_page: int, end: int) -> bool:
        """Whether the tokens on a prompt's last page are a chunk of their own: only where this
        avoids rebuilding keys and values, and costs a prompt without cached pages little."""
        return (
            self._rebuilds_keys
            and start < last_page
            and (end - last_page) * TOKENS_PER_TAIL_TOKEN <= end
            and self._choose_path(last_page - start) == "expanded"
            and self._choose_path(end - last_page) != "expanded"
        )

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
