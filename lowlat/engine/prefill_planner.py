"""How a sequence is read: in which pieces, and by which arithmetic each token's row is computed.

Owns the rule that makes rows reproducible: the path of a row follows from its position and from the
length of its request's prompt, never from what else is running. A prompt lies on a fixed grid of
chunks, each of the path that suits its length; what is generated is a stream.
"""

from dataclasses import dataclass
from functools import cache, partial

from lowlat.attention.path import AttentionPath, choose_path
from lowlat.config.attention import ModelAttention

PREFILL_CHUNK = 2048
"""Tokens of a chunk of a prompt. In the expanded path each chunk builds the keys and values of all
rows before it again: at 8,192 tokens a fifth of the products with chunks of 1,024, half of that
with these."""


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next tokens of a sequence to read in one step."""

    length: int
    path: AttentionPath


class PrefillPlanner:
    """Plans the reading of sequences in chunks of `chunk` tokens or a few more: whole pages of
    `page_size`, so that no page of a prompt is of two paths."""

    def __init__(self, attention: ModelAttention, *, chunk: int, page_size: int) -> None:
        assert chunk > 0, chunk
        self.chunk = -(-chunk // page_size) * page_size
        self.page_size = page_size
        self._choose_path = cache(partial(choose_path, attention))

    def path(self, position: int, prompt_length: int) -> AttentionPath:
        """The path of the row at `position` of a sequence whose prompt has `prompt_length`
        tokens."""
        if position >= prompt_length:
            return "decode"
        start = position - position % self.chunk
        return self._choose_path(min(self.chunk, prompt_length - start))

    def next_chunk(self, start: int, prompt_length: int, length: int, limit: int) -> PrefillChunk:
        """The chunk that follows `start` rows of a sequence of `length` tokens, of at most `limit`
        tokens."""
        end = length
        if start < prompt_length:
            end = min(start - start % self.chunk + self.chunk, prompt_length)
        return PrefillChunk(min(end - start, limit), self.path(start, prompt_length))

    def page_path(self, page: int, prompt_length: int) -> str:
        """By which arithmetic the rows of a sequence's page number `page` (from 0) are computed;
        rows of equal tokens after equal tokens are equal where these agree for all pages so far.
        """
        start = page * self.page_size
        of_prompt = prompt_length - start
        path = self.path(start, prompt_length)
        if path != "decode" and of_prompt < self.page_size:
            # The page goes on with generated tokens, which are a stream.
            return f"{path} {of_prompt}"
        return path
