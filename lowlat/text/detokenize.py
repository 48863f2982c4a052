"""Incremental detokenizer for streaming. Stop strings are `text.stops`'s."""

import codecs

from lowlat.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns token ids, one at a time, into text that is final.

    The results of all `push` calls and one `flush`, joined, are `tokenizer.decode` of all ids; or
    if the ids continue a text, what they add to its decoding. A character whose bytes are spread
    over several tokens is returned with its last byte; bytes that cannot become a character are
    returned as U+FFFD as soon as that is certain. A call takes time linear in its token's length.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        keep_special: frozenset[int] = frozenset(),
        begins_text: bool = True,
    ) -> None:
        """keep_special: special tokens that are not skipped. begins_text: whether no text precedes
        the first token.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - keep_special if skip_special_tokens else frozenset()
        self._start(begins_text=begins_text)

    def _start(self, *, begins_text: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = begins_text and self._tokenizer.strips_leading_space

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes: often empty, only whole characters."""
        if token_id in self._skipped:
            return ""
        return self._clean(self._decoder.decode(self._tokenizer.id_to_bytes(token_id)))

    def flush(self) -> str:
        """The rest of an unfinished character (U+FFFD); the next push starts a new text."""
        text = self._clean(self._decoder.decode(b"", final=True))
        self._start(begins_text=True)
        return text

    def _clean(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
