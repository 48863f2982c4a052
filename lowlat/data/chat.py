"""Chats as tokens, and which of them are targets: what the assistant says, and the tokens that end
it.

A turn's answer is what the template adds to the prompt before it. Rendering and encoding are
lowlat.text's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from lowlat.data.documents import BadDocument, ChatDocument
from lowlat.data.reasoning import (
    CLOSE,
    OPEN,
    end_of_answer,
    is_opened,
    opens_reasoning,
    parts,
)
from lowlat.text.chat_prompt import encode_chat
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError


class ChatEncoder:
    """Chats to tokens through the tokenizer's own template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lengths: dict[int, int] = {}

    @cached_property
    def _opens_reasoning(self) -> bool:
        return opens_reasoning(self._tokenizer)

    def encode(
        self, chat: ChatDocument
    ) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"], int]:
        """The ids of `chat`, which of them are targets, and how many bytes of text they stand for.

        No message can write a control token. A token with bytes of both the prompt and the answer
        is a target; blanks that the template puts after an answer's end token are not.
        Where the template asks for answers with reasoning open, only the last one is learned: those
        before it stand without theirs. Raises BadDocument where the template refuses the chat, asks
        for reasoning that is not there, or renders an answer otherwise once more follows it (as
        templates do that leave out earlier reasoning): what was to be learned could not be told
        then. UserError where the tokenizer has no template.
        """
        ids, answers = self._last(chat) if self._opens_reasoning else self._all(chat)
        loss_mask = np.zeros(len(ids), np.bool_)
        for answer in answers:
            loss_mask[answer] = True
        return np.array(ids, np.int64), loss_mask, sum(map(self._length, ids))

    def _all(self, chat: ChatDocument) -> tuple[list[int], list[slice]]:
        """The ids of `chat`, and where its answers are in them."""
        ids = self._ids(chat, chat.messages, asks=False)
        roles = [message["role"] for message in chat.messages]
        places = [place for place, role in enumerate(roles) if role == "assistant"]
        return ids, [self._answer(chat, place, ids) for place in places]

    def _last(self, chat: ChatDocument) -> tuple[list[int], list[slice]]:
        """The same to the last answer, which alone is told, after the prompt that asks for it."""
        roles = [message["role"] for message in chat.messages]
        if "assistant" not in roles:
            return self._ids(chat, chat.messages, asks=False), []
        last = len(roles) - 1 - roles[::-1].index("assistant")
        chat = replace(chat, messages=chat.messages[: last + 1])
        prompt = self._ids(chat, chat.messages[:last], asks=True)
        ids = self._ids(chat, chat.messages, asks=False)
        opened = self._bytes(prompt)
        said = parts(chat.messages[last])
        is_whole = ids[: len(prompt)] == prompt
        is_whole |= said is None and self._bytes(ids).startswith(opened)
        if is_whole or not is_opened(opened):
            return ids, [self._answer(chat, last, ids)]
        ids = [*prompt, *self._reasoned(chat, said)]
        return ids, [slice(len(prompt), self._after_end(ids, len(prompt), len(ids)))]

    def _reasoned(self, chat: ChatDocument, said: tuple[str, str] | None) -> list[int]:
        """What a model is to say where its reasoning is open, to the end of the turn: `parts`."""
        if said is None:
            raise BadDocument(
                f"{chat.origin}: the chat template asks for answers that begin with {OPEN}, and "
                f"the last one is no reasoning and text; give it reasoning_content, or {CLOSE} in "
                "its content, or pass --invalid skip"
            )
        thought, answer = (
            self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)
            for text in said
        )
        closed = self._tokenizer.encode(CLOSE, add_special_tokens=False)
        return [*thought, *closed, *answer, *end_of_answer(self._tokenizer)]

    def _answer(self, chat: ChatDocument, index: int, ids: list[int]) -> slice:
        """Which of the chat's `ids` are the answer that is message `index`."""
        ends = np.cumsum([self._length(id) for id in ids])
        prompt = self._ids(chat, chat.messages[:index], asks=True)
        last = index + 1 == len(chat.messages)
        told = ids if last else self._ids(chat, chat.messages[: index + 1], asks=False)
        start = self._common_bytes(chat, prompt, ids, ends)
        stop = self._common_bytes(chat, told, ids, ends)
        first = int(np.searchsorted(ends, start, side="right"))
        after = int(np.searchsorted(ends, stop, side="left")) + 1
        return slice(first, self._after_end(ids, first, after))

    def _after_end(self, ids: list[int], first: int, after: int) -> int:
        """Where the answer `first` to `after` - 1 ends, without blanks behind its end token."""
        for place in range(after - 1, first - 1, -1):
            if ids[place] in self._tokenizer.special_ids:
                return place + 1
            if not self._tokenizer.id_to_bytes(ids[place]).isspace():
                break
        return after

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
