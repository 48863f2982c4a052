"""Tokenization of chats for supervised fine-tuning (SFT), with a loss mask, in place of labels
of -100 (ignore_index): the targets are the assistant's answers and their end tokens.

An answer is the text that the chat template adds after the generation prompt. Templates whose
generation prompt opens reasoning, as DeepSeek-R1's with <think>, omit the reasoning of answers in a
rendered chat: there the target is assembled from its two parts. `lowlat.text` renders and encodes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from lowlat.data.documents import BadDocument, ChatDocument
from lowlat.text.chat_prompt import encode_chat
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

OPEN, CLOSE = "<think>", "</think>"
_OPENED = re.compile(rf"{OPEN}\s*\Z".encode())
_PROBE = "\ue000"
"""A private-use character, which no template contains."""


class ChatEncoder:
    """Encodes chats with the tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lengths: dict[int, int] = {}

    @cached_property
    def _opens_reasoning(self) -> bool:
        """Whether the generation prompt of the chat template, if any, opens reasoning."""
        if self._tokenizer.chat_template is None:
            return False
        try:
            text = self._tokenizer.apply_chat_template([{"role": "user", "content": _PROBE}])
        except UserError:  # encoding a chat raises it again
            return False
        return _is_opened(text.encode())

    def encode(
        self, chat: ChatDocument
    ) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"], int]:
        """Token ids of `chat`, loss mask, and bytes of text.

        Text of messages never encodes to control tokens. A token with bytes of both prompt and
        answer is a target; blanks that the template puts after an answer's end token are not.

        If the generation prompt opens reasoning (<think>), only the last answer is a target,
        because the template omits the reasoning of earlier answers.

        Raises BadDocument if the template rejects the chat, if an answer lacks the reasoning that
        the template opens, or if an answer renders differently once more messages follow. Raises
        UserError without a template.
        """
        ids, answers = self._last(chat) if self._opens_reasoning else self._all(chat)
        loss_mask = np.zeros(len(ids), np.bool_)
        for answer in answers:
            loss_mask[answer] = True
        return np.array(ids, np.int64), loss_mask, sum(map(self._length, ids))

    def _all(self, chat: ChatDocument) -> tuple[list[int], list[slice]]:
        """The ids of `chat`, and the slices of its answers."""
        ids = self._ids(chat, chat.messages, asks=False)
        roles = [message["role"] for message in chat.messages]
        places = [place for place, role in enumerate(roles) if role == "assistant"]
        return ids, [self._answer(chat, place, ids) for place in places]

    def _last(self, chat: ChatDocument) -> tuple[list[int], list[slice]]:
        """The ids of `chat` up to its last answer, and the slice of that answer."""
        roles = [message["role"] for message in chat.messages]
        if "assistant" not in roles:
            return self._ids(chat, chat.messages, asks=False), []
        last = len(roles) - 1 - roles[::-1].index("assistant")
        chat = replace(chat, messages=chat.messages[: last + 1])
        prompt = self._ids(chat, chat.messages[:last], asks=True)
        ids = self._ids(chat, chat.messages, asks=False)
        opened = self._bytes(prompt)
        said = _parts(chat.messages[last])
        is_whole = ids[: len(prompt)] == prompt
        is_whole |= said is None and self._bytes(ids).startswith(opened)
        if is_whole or not _is_opened(opened):
            return ids, [self._answer(chat, last, ids)]
        ids = [*prompt, *self._reasoned(chat, said)]
        return ids, [slice(len(prompt), self._after_end(ids, len(prompt), len(ids)))]

    def _reasoned(self, chat: ChatDocument, said: tuple[str, str] | None) -> list[int]:
        """Ids of reasoning and answer (`_parts`) after an opened <think>, to the turn's end."""
        if said is None:
            raise BadDocument(
                f"{chat.origin}: the chat template starts answers with {OPEN}, but the last answer "
                f"has no reasoning; give it reasoning_content, or {CLOSE} in its content, or pass "
                "--invalid skip"
            )
        thought, answer = (
            self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)
            for text in said
        )
        closed = self._tokenizer.encode(CLOSE, add_special_tokens=False)
        return [*thought, *closed, *answer, *_end_of_answer(self._tokenizer)]

    def _answer(self, chat: ChatDocument, index: int, ids: list[int]) -> slice:
        """Slice of the chat's `ids` that is the answer in message `index`."""
        ends = np.cumsum([self._length(id) for id in ids])
        prompt = self._ids(chat, chat.messages[:index], asks=True)
        last = index + 1 == len(chat.messages)
        answered = ids if last else self._ids(chat, chat.messages[: index + 1], asks=False)
        start = self._common_bytes(chat, prompt, ids, ends)
        stop = self._common_bytes(chat, answered, ids, ends)
        first = int(np.searchsorted(ends, start, side="right"))
        after = int(np.searchsorted(ends, stop, side="left")) + 1
        return slice(first, self._after_end(ids, first, after))

    def _after_end(self, ids: list[int], first: int, after: int) -> int:
        """End of the answer `first` to `after` - 1, without blanks after its end token."""
        for place in range(after - 1, first - 1, -1):
            if ids[place] in self._tokenizer.special_ids:
                return place + 1
            if not self._tokenizer.id_to_bytes(ids[place]).isspace():
                break
        return after

    def _common_bytes(
        self, chat: ChatDocument, part: list[int], ids: list[int], ends: Int64[np.ndarray, " n"]
    ) -> int:
        """Bytes of `part`, which must be a prefix of the chat's `ids`."""
        size = sum(self._length(id) for id in part)
        if part != ids[: len(part)]:
            count = int(np.searchsorted(ends, size, side="left")) + 1
            if not self._bytes(ids[:count]).startswith(self._bytes(part)):
                raise BadDocument(
                    f"{chat.origin}: the chat template renders a turn differently when more"
                    " follows; keep the last answer only, or pass --invalid skip"
                )
        return size

    def _ids(
        self, chat: ChatDocument, messages: Sequence[Mapping[str, Any]], *, asks: bool
    ) -> list[int]:
        """Ids of the rendered `messages`, with the generation prompt if `asks`."""
        if self._tokenizer.chat_template is None:
            self._tokenizer.apply_chat_template([])  # raises UserError with the remedy
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


def _is_opened(prompt: bytes) -> bool:
    """Whether `prompt` ends with an opened <think>."""
    return _OPENED.search(prompt) is not None


def _end_of_answer(tokenizer: Tokenizer) -> list[int]:
    """Ids that the template puts after an answer. Raises UserError if it rejects a plain chat."""
    messages = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    return tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False)


def _parts(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """(reasoning, answer) of a message, with the blanks around </think>.

    Reasoning is reasoning_content, or the content before </think>. None without reasoning, and for
    tool calls, which these templates render without reasoning.
    """
    content, thought = message.get("content"), message.get("reasoning_content")
    if not isinstance(content, str) or message.get("tool_calls"):
        return None
    if isinstance(thought, str) and thought:
        return f"{thought}\n", f"\n\n{content}"
    thought, closed, answer = content.partition(CLOSE)
    if not closed:
        return None
    return thought.removeprefix(OPEN).removeprefix("\n"), answer
