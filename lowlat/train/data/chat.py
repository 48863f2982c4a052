"""Chats as tokens, and which of them are targets: what the assistant says, and the tokens that end
it.

A turn's answer is what the template adds to the prompt before it. Rendering and encoding are
lowlat.text's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from lowlat.text.chat_prompt import encode_chat
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.data.documents import BadDocument, ChatDocument
from lowlat.utils.errors import UserError


class ChatEncoder:
    """Chats to tokens through the tokenizer's own template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lengths: dict[int, int] = {}

    def encode(
        self, chat: ChatDocument
    ) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"], int]:
        """The ids of `chat`, which of them are targets, and how many bytes of text they stand for.

        No message can write a control token. A token with bytes of both the prompt and the answer
        is a target; blanks that the template puts after an answer's end token are not.
        Raises BadDocument where the template refuses the chat, or renders an answer otherwise
        once more follows it (as templates do that leave out earlier reasoning): what was to be
        learned could not be told then. UserError where the tokenizer has no template.
        """
        ids = self._ids(chat, chat.messages, asks=False)
        ends = np.cumsum([self._length(id) for id in ids])
        predicted = np.zeros(len(ids), np.bool_)
        for index, message in enumerate(chat.messages):
            if message["role"] == "assistant":
                predicted[self._answer(chat, index, ids, ends)] = True
        return np.array(ids, np.int64), predicted, int(ends[-1]) if ids else 0

    def _answer(
        self, chat: ChatDocument, index: int, ids: list[int], ends: Int64[np.ndarray, " n"]
    ) -> slice:
        """Which of the chat's `ids` are the answer that is message `index`."""
        prompt = self._ids(chat, chat.messages[:index], asks=True)
        last = index + 1 == len(chat.messages)
        told = ids if last else self._ids(chat, chat.messages[: index + 1], asks=False)
        start = self._common_bytes(chat, prompt, ids, ends)
        stop = self._common_bytes(chat, told, ids, ends)
        first = int(np.searchsorted(ends, start, side="right"))
        after = int(np.searchsorted(ends, stop, side="left")) + 1
        special = self._tokenizer.special_ids
        for place in range(after - 1, first - 1, -1):
            if ids[place] in special:
                after = place + 1
                break
            if not self._tokenizer.id_to_bytes(ids[place]).isspace():
                break
        return slice(first, after)

    def _common_bytes(
        self, chat: ChatDocument, part: list[int], ids: list[int], ends: Int64[np.ndarray, " n"]
    ) -> int:
        """Bytes of `part`, which the whole chat's `ids` must begin with."""
        size = sum(self._length(id) for id in part)
        if part != ids[: len(part)]:
            count = int(np.searchsorted(ends, size, side="left")) + 1
            if not self._bytes(ids[:count]).startswith(self._bytes(part)):
                raise BadDocument(
                    f"{chat.origin}: the chat template renders a turn otherwise when more follows;"
                    " keep the last answer only, or pass --invalid skip"
                )
        return size

    def _ids(
        self, chat: ChatDocument, messages: Sequence[Mapping[str, Any]], *, asks: bool
    ) -> list[int]:
        """`messages` as the template renders them, with what asks for an answer or without."""
        if self._tokenizer.chat_template is None:
            self._tokenizer.apply_chat_template([])  # says what to do
        try:
            return encode_chat(
                self._tokenizer, messages, tools=chat.tools, add_generation_prompt=asks
            )
        except UserError as error:
            raise BadDocument(f"{chat.origin}: {error}") from error

    def _bytes(self, ids: list[int]) -> bytes:
        return b"".join(self._tokenizer.id_to_bytes(id) for id in ids)

    def _length(self, id: int) -> int:
        if id not in self._lengths:
            self._lengths[id] = len(self._tokenizer.id_to_bytes(id))
        return self._lengths[id]
